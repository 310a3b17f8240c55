#!/bin/sh
# All steps on images of your own: pretraining, the three stages, a page about the scores.
# Every variable can be given in the environment: image_dir=/data/flowers sh local_own.sh
# The same command goes on where a killed one was; what is finished is not done again.
set -eu
cd "$(dirname "$0")"

# For all steps. The defaults are for the digits of README.
image_dir=${image_dir:-output/digits}                           # train/CLASS/*, val/CLASS/*
save_dir=${save_dir:-output/own}                                # of all that is made
backbone=${backbone:-resnet48_mini}                             # small; or resnet48, on GPUs
image_size=${image_size:-32}
batch_size=${batch_size:-32}
flip_prob=${flip_prob:-0}
num_workers=${num_workers:-2}
use_tensor_dataset=${use_tensor_dataset:-False}                 # decode once, keep in a file
cache_dir=${cache_dir:-None}                                    # its folder; None: ~/.cache/pinas
bad_images=${bad_images:-fatal}                                 # or skip
amp=${amp:-O0}                                                  # O1: mixed precision on GPUs
accumulate=${accumulate:-1}                                     # parts of a batch, to save memory
log_freq=${log_freq:-50}                                        # steps
resume=${resume:-auto}                                          # None: what is unfinished anew
seed=${seed:-0}
device=${device:-auto}
# The largest network, with labels: stage 1's start and stage 2's teacher.
pretrain_epochs=${pretrain_epochs:-16}
pretrain_lr=${pretrain_lr:-0.1}                                 # for a batch of 256, as all rates
pretrain_warmup=${pretrain_warmup:-2}                           # epochs
pretrain_crop=${pretrain_crop:-0.8}                             # smallest share of an image
pretrain_clip_norm=${pretrain_clip_norm:-0}                     # of gradients; 0: any; auto: small
# Stage 1.
stage1_epochs=${stage1_epochs:-2}
stage1_lr=${stage1_lr:-0.005}
stage1_warmup=${stage1_warmup:-1}
stage1_crop=${stage1_crop:-0.5}
stage1_clip_norm=${stage1_clip_norm:-auto}
queue_size=${queue_size:-512}                                   # a third of the images at most
key_momentum=${key_momentum:-0.99}                              # auto: for thousands of steps
stage1_weights=${stage1_weights:-0}                             # of which epoch; or final
# Stage 2.
stage2_epochs=${stage2_epochs:-3}
stage2_lr=${stage2_lr:-0.02}
stage2_warmup=${stage2_warmup:-1}
stage2_crop=${stage2_crop:-0.8}
stage2_clip_norm=${stage2_clip_norm:-auto}
stage2_weights=${stage2_weights:-final}                         # of which epoch; 0: the first
# Stage 3.
codes=${codes:-500}                                             # how many to draw and score
modelarch_file=${modelarch_file:-}                              # codes of your own; none: draw
. hnas/tools/launch.sh

[ $# = 0 ] || refuse "local_own.sh takes variables, no flags as $1; see its top"
for name in max_epoch lr warmup crop_scale_min clip_norm pretrained ckpt_dir use_ckpt; do
    eval "[ -z \"\${$name+given}\" ]" ||
        refuse "$name is not for local_own.sh: each step has its own, as stage2_lr; see its top"
done
for name in images_part eval_engine train_flag; do
    eval "[ -z \"\${$name+given}\" ]" ||
        refuse "$name is not for local_own.sh: give it to a launcher, with a save_dir of its own"
done
[ "$nnodes" = 1 ] || refuse "nnodes=$nnodes: local_own.sh is for one machine; start the launchers"
case $backbone in
    resnet48) contrast=resnet48pinasv2 ;;
    resnet48_mini) contrast=resnet48pinasv2_mini ;;
    *) refuse "backbone=$backbone is neither resnet48 nor resnet48_mini" ;;
esac
export image_dir backbone image_size batch_size flip_prob num_workers use_tensor_dataset cache_dir
export bad_images amp accumulate log_freq resume seed device
check_save_dir
# What would be refused after hours.
[ "$codes" -ge 3 ] 2>/dev/null || refuse "codes=$codes is not a whole number of at least 3"
[ -z "$modelarch_file" ] || { [ -f "$modelarch_file" ] && [ -r "$modelarch_file" ]; } ||
    refuse "cannot read modelarch_file=$modelarch_file"
case $batch_size,$queue_size in
    0* | ,* | *,0* | *, | *[!0-9,]*) ;; # refused by the first step, or by the second
    *) [ -f "$save_dir/stage1/finished.txt" ] ||
        [ $((queue_size % (batch_size * local_processes))) = 0 ] ||
        refuse "queue_size=$queue_size is no multiple of batch_size=$batch_size x processes" ;;
esac
all=$save_dir
pretrained=$all/pretrained.pdparams

pretrain() {
    # Paddle's launcher takes a file, not a module.
    export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
    launch hnas/tools/pretrain.py run --backbone "$backbone" --image_dir "$image_dir" \
        --pretrained "$pretrained" --save_dir "$save_dir" --image_size "$image_size" \
        --batch_size "$batch_size" --max_epoch "$max_epoch" --lr "$lr" --warmup "$warmup" \
        --crop_scale_min "$crop_scale_min" --clip_norm "$clip_norm" --flip_prob "$flip_prob" \
        --num_workers "$num_workers" \
        --use_tensor_dataset "$use_tensor_dataset" --cache_dir "$cache_dir" --keep 1 \
        --bad_images "$bad_images" --amp "$amp" --accumulate "$accumulate" \
        --log_freq "$log_freq" --resume "$resume" --seed "$seed" --device "$device"
}
stage1() { sh local_train_pinas1_wholenet.sh; }
stage2() { sh local_train_pinas2_simple_wholenet_nof.sh; }
stage3() { sh local_eval.sh; }

# Variables that may change from start to start: how results are computed, and which broken images
# are left out. Files count by their content, so that folders may be moved.
neutral='.*_dir|pretrained|modelarch_file|resume|device|num_workers|bad_images|amp|accumulate|keep'
neutral="$neutral|save_.*|.*_freq|chunk_size|cache_gb|fused"

# settings VARIABLE=VALUE...: what a step's results depend on, of these and of all that is given.
settings() {
    case $name in
        pretrain) taken=$(variables local_own.sh | grep -vE 'stage|pretrain|codes|queue|key') ;;
        stage1) taken=$(variables local_train_pinas1_wholenet.sh) ;;
        stage2) taken=$(variables local_train_pinas2_simple_wholenet_nof.sh) ;;
        stage3) taken=$(variables local_eval.sh | grep -vx batch_size) ;;
    esac
    taken=$(echo "$taken" | grep -vxE "$neutral" | paste -sd '|' -)
    env "$@" | grep -E "^(image_dir|max_epoch|lr|warmup|crop_scale_min|clip_norm|$taken)=" | sort
    for given; do
        case $given in
            pretrained=* | ckpt_dir=*)
                echo "${given%%=*}=$(cut -c -12 "${given#*=}.sha256" 2>/dev/null)" ;;
            modelarch_file=*) echo "modelarch_file=$(cksum <"${given#*=}")" ;;
        esac
    done
}

# step NAME VARIABLE=VALUE...: runs the function NAME with these variables, in a folder of that name,
# which then says so. Where it says so already, with the same settings, nothing is done.
step() {
    name=$1 own=$all/$1
    shift
    now=$(settings "$@")
    for made in "$own/finished.txt" "$own/begun.txt"; do
        if [ ! -f "$made" ] || [ "$(cat "$made")" = "$now" ]; then
            continue
        fi
        case $made,$resume in
            *finished.txt,*) ;;
            *,None | *,False) continue ;;
            *) ls "$own"/*.pdstates >/dev/null 2>&1 || continue ;; # nothing to go on from
        esac
        differs=$(grep -vxF "$now" "$made" || :; echo "$now" | grep -vxFf "$made" | sed 's/^/now /')
        refuse "$own is of other settings or files ($(echo "$differs" | paste -sd , -)): remove it \
to make it anew, or choose another save_dir"
    done
    if [ -f "$own/finished.txt" ]; then
        echo "== $name: finished before, in $own"
        return
    fi
    echo "== $name"
    mkdir -p -- "$own" 2>/dev/null || refuse "cannot make the folder $own; choose another save_dir"
    echo "$now" >"$own/begun.txt"
    began=$(date +%s)
    (
        [ "$resume" != auto ] || ls "$own"/*.pdstates >/dev/null 2>&1 || resume=None
        export save_dir="$own" PINAS_STEP="$name" "$@"
        "$name"
    )
    echo "$name $(($(date +%s) - began))" >>"$all/seconds.txt"
    echo "$now" >"$own/begun.txt" # another start may have written it, and been refused
    mv "$own/begun.txt" "$own/finished.txt"
}

step pretrain max_epoch="$pretrain_epochs" lr="$pretrain_lr" \
    warmup="$pretrain_warmup" crop_scale_min="$pretrain_crop" clip_norm="$pretrain_clip_norm"
step stage1 backbone="$contrast" pretrained="$pretrained" \
    max_epoch="$stage1_epochs" lr="$stage1_lr" warmup="$stage1_warmup" \
    crop_scale_min="$stage1_crop" clip_norm="$stage1_clip_norm" \
    queue_size="$queue_size" key_momentum="$key_momentum"
step stage2 pretrained="$pretrained" \
    ckpt_dir="$all/stage1/$stage1_weights.pdparams" max_epoch="$stage2_epochs" lr="$stage2_lr" \
    warmup="$stage2_warmup" crop_scale_min="$stage2_crop" clip_norm="$stage2_clip_norm"
if [ -z "$modelarch_file" ]; then
    modelarch_file=$all/architectures.json
    "$python" -m hnas.tools.draw_architectures --number "$codes" --seed "$seed" \
        --output "$modelarch_file"
fi
step stage3 ckpt_dir="$all/stage2/$stage2_weights.pdparams" \
    modelarch_file="$modelarch_file"
"$python" -m hnas.tools.rank_report --pred "$all/stage3/submission.json" --out "$all/report" \
    >"$all/report.txt"
"$python" -m hnas.tools.demo_summary --demo_dir "$all"
