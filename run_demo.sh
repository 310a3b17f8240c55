#!/bin/sh
# The whole recipe on real images, small enough for two CPU cores: makes .venv, writes a folder of
# handwritten digits, trains "pretrained" weights, then runs the three launchers in order.
# Everything lands in output/demo; a second run starts anew.
set -eu
cd "$(dirname "$0")"
. hnas/tools/setup_venv.sh

demo=output/demo
rm -rf "$demo"
mkdir -p "$demo"

# What all steps share; the launchers take their variables from the environment.
export python="$venv_python"
export image_dir="$demo/data" pretrained="$demo/pretrained.pdparams"
export image_size=32 batch_size=32 num_workers=0 use_tensor_dataset=True log_freq=45
export flip_prob=0    # a mirrored digit is not that digit
# For the programs that have no launcher: threads, and third parties' warnings.
. hnas/tools/launch.sh

# timed NAME COMMAND...: runs the command and keeps its wall time for the table.
timed() {
    name=$1
    shift
    echo "== $name"
    began=$(date +%s)
    "$@"
    echo "$name $(($(date +%s) - began))" >>"$demo/seconds.txt"
}

timed data "$python" -m hnas.tools.digits_folder --output "$image_dir"
"$python" -m hnas.tools.draw_architectures --number 200 --output "$demo/architectures.json"

timed pretrain "$python" -m hnas.tools.pretrain run \
    --backbone resnet48_mini --image_dir "$image_dir" --pretrained "$pretrained" \
    --save_dir "$demo/pretrain" --save_freq 100 --max_epoch 16 --warmup 2 --lr 0.1 \
    --batch_size "$batch_size" --image_size "$image_size" --num_workers "$num_workers" \
    --crop_scale_min 0.8 --flip_prob "$flip_prob" --use_tensor_dataset True \
    --device "${device:-auto}" --log_freq "$log_freq"

timed stage1 env backbone=resnet48pinasv2_mini save_dir="$demo/stage1" \
    max_epoch=2 lr=0.005 queue_size=512 key_momentum=0.99 crop_scale_min=0.5 \
    sh local_train_pinas1_wholenet.sh

timed stage2 env backbone=resnet48_mini save_dir="$demo/stage2" \
    ckpt_dir="$demo/stage1/0.pdparams" max_epoch=3 warmup=1 lr=0.02 crop_scale_min=0.8 \
    sh local_train_pinas2_simple_wholenet_nof.sh

timed stage3 env backbone=resnet48_mini save_dir="$demo/stage3" \
    ckpt_dir="$demo/stage2/final.pdparams" modelarch_file="$demo/architectures.json" \
    sh local_eval.sh

# What the scores say by themselves, as a page.
"$python" -m hnas.tools.rank_report --pred "$demo/stage3/submission.json" --out "$demo/report" \
    >"$demo/report.txt"
"$python" -m hnas.tools.demo_summary --demo_dir "$demo"
