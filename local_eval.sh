#!/bin/sh
# Stage three: score every architecture of a file with the stage-two supernet.
# Every variable can be given in the environment: image_dir=/data/ILSVRC2012 sh THIS_SCRIPT
set -eu
cd "$(dirname "$0")"

image_dir=${image_dir:-/data/ILSVRC2012}                        # val/CLASS/*
ckpt_dir=${ckpt_dir:-checkpoint_files/stage2/0.pdparams}        # stage two's weights
modelarch_file=${modelarch_file:-CVPR_2022_NAS_Track1_test.json}
save_dir=${save_dir:-checkpoint_files/stage3}                   # submission.json
backbone=${backbone:-resnet48}
image_size=${image_size:-224}
batch_size=${batch_size:-256}
bn_calibration_images=${bn_calibration_images:-auto}            # auto: 0 with freeze_bn, else 64
eval_engine=${eval_engine:-shared}                              # shared or reference
eval_images=${eval_images:-0}                                   # 0: all
chunk_size=${chunk_size:-0}                                     # images a walk; 0: by memory
target_tau=${target_tau:-0}                                     # stop early above it; 0: never
images_part=${images_part:-None}                                # as 2/8: a part of the images
cache_gb=${cache_gb:-8}                                         # GiB for decoded images
amp=${amp:-O0}                                                  # O1: half precision, if there is
fused=${fused:-auto}                                            # off: no fused operator on GPUs
eval_sample_num=${eval_sample_num:-0}                           # first N only; 0: all
bad_images=${bad_images:-fatal}                                 # or skip
rank_gt=${rank_gt:-None}                                        # a truth: a file, or imagenet30
seed=${seed:-0}
device=${device:-auto}
. hnas/tools/launch.sh

launch train_supernet.py run \
    --backbone "$backbone" --image_size "$image_size" --batch_size "$batch_size" \
    --ckpt_dir "$ckpt_dir" --modelarch_file "$modelarch_file" \
    --bn_calibration_images "$bn_calibration_images" \
    --eval_engine "$eval_engine" --eval_images "$eval_images" --chunk_size "$chunk_size" \
    --target_tau "$target_tau" --images_part "$images_part" \
    --cache_gb "$cache_gb" --amp "$amp" --fused "$fused" \
    --eval_sample_num "$eval_sample_num" --rank_gt "$rank_gt" --bad_images "$bad_images" \
    --image_dir "$image_dir" --save_dir "$save_dir" --seed "$seed" --device "$device" "$@"
