#!/bin/sh
# Stage one: contrastive training of the supernet from official pretrained weights.
# Every variable can be given in the environment: image_dir=/data/ILSVRC2012 sh THIS_SCRIPT
set -eu
cd "$(dirname "$0")"

image_dir=${image_dir:-/data/ILSVRC2012}                        # train/CLASS/*
pretrained=${pretrained:-checkpoint_files/resnet48.pdparams}    # official weights
save_dir=${save_dir:-checkpoint_files/stage1}                   # 0.pdparams, 1.pdparams, ...
backbone=${backbone:-resnet48pinasv2}
image_size=${image_size:-224}
max_epoch=${max_epoch:-10}
batch_size=${batch_size:-256}
lr=${lr:-0.0008}                                                # for a batch of 256
warmup=${warmup:-1}                                             # epochs
weight_decay=${weight_decay:-0.0001}
momentum=${momentum:-0.9}
recipe=${recipe:-own}                                           # or public: as the public code
lr_schedule=${lr_schedule:-auto}                                # cosine, swing; auto: by recipe
largest_net_in_stage1=${largest_net_in_stage1:-True}            # else two uniform draws
stage1_views=${stage1_views:-auto}                              # two_kinds, one_kind, same
freeze_bn=${freeze_bn:-True}                                    # train at the statistics given
queue_size=${queue_size:-40960}
key_momentum=${key_momentum:-auto}                              # 0.999 ** (total batch / 256)
temperature=${temperature:-0.1}
crop_scale_min=${crop_scale_min:-0.08}
flip_prob=${flip_prob:-0.5}
amp=${amp:-O0}                                                  # O1: mixed precision on GPUs
accumulate=${accumulate:-1}                                     # parts of a batch
clip_norm=${clip_norm:-0}                                       # of all gradients; 0: any; or auto
use_tensor_dataset=${use_tensor_dataset:-False}                 # decode once, keep in a file
storage_size=${storage_size:-0}                                 # px of it; 0: 8/7 of image_size
cache_dir=${cache_dir:-None}                                    # its folder; None: ~/.cache/pinas
num_workers=${num_workers:-8}
save_freq=${save_freq:-1}                                       # epochs
save_steps=${save_steps:-500}                                   # steps; 0: at epochs' ends only
keep=${keep:-0}                                                 # epochs besides the first; 0: all
bad_images=${bad_images:-fatal}                                 # or skip
eval_freq=${eval_freq:-1}                                       # epochs; 0: never
log_freq=${log_freq:-50}                                        # steps
visualdl_dir=${visualdl_dir:-None}                              # folder of curves
resume=${resume:-None}                                          # a folder, or auto
seed=${seed:-0}
device=${device:-auto}
. hnas/tools/launch.sh

launch train_supernet_pinas_stage1.py run \
    --backbone "$backbone" --image_size "$image_size" --max_epoch "$max_epoch" \
    --batch_size "$batch_size" --lr "$lr" --warmup "$warmup" \
    --weight_decay "$weight_decay" --momentum "$momentum" \
    --recipe "$recipe" --lr_schedule "$lr_schedule" \
    --largest_net_in_stage1 "$largest_net_in_stage1" \
    --stage1_views "$stage1_views" --freeze_bn "$freeze_bn" \
    --queue_size "$queue_size" --key_momentum "$key_momentum" --temperature "$temperature" \
    --crop_scale_min "$crop_scale_min" --flip_prob "$flip_prob" \
    --pretrained "$pretrained" --image_dir "$image_dir" --save_dir "$save_dir" \
    --amp "$amp" --accumulate "$accumulate" --clip_norm "$clip_norm" \
    --use_tensor_dataset "$use_tensor_dataset" --storage_size "$storage_size" \
    --cache_dir "$cache_dir" --visualdl_dir "$visualdl_dir" \
    --num_workers "$num_workers" \
    --save_freq "$save_freq" --save_steps "$save_steps" --keep "$keep" \
    --bad_images "$bad_images" --eval_freq "$eval_freq" --log_freq "$log_freq" \
    --resume "$resume" --seed "$seed" --device "$device" "$@"
