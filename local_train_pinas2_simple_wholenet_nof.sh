#!/bin/sh
# Stage two: distillation from the pretrained teacher, sub-networks sampled toward large.
# Every variable can be given in the environment: image_dir=/data/ILSVRC2012 sh THIS_SCRIPT
set -eu
cd "$(dirname "$0")"

image_dir=${image_dir:-/data/ILSVRC2012}                        # train/CLASS/*, val/CLASS/*
pretrained=${pretrained:-checkpoint_files/resnet48.pdparams}    # teacher: official weights
use_ckpt=${use_ckpt:-True}                                      # False: start from the teacher's
ckpt_dir=${ckpt_dir:-checkpoint_files/stage1/0.pdparams}        # stage one's weights
save_dir=${save_dir:-checkpoint_files/stage2}                   # 0.pdparams, 1.pdparams, ...
backbone=${backbone:-resnet48}
image_size=${image_size:-224}
max_epoch=${max_epoch:-5}
batch_size=${batch_size:-256}
dyna_batch_size=${dyna_batch_size:-4}                           # sub-networks a step
lr=${lr:-0.0005}                                                # for a batch of 256
warmup=${warmup:-5}                                             # epochs
weight_decay=${weight_decay:-0.00003}
momentum=${momentum:-0.9}
sample_method=${sample_method:-random}                          # random, sandwich, fair
bias_sample_flag=${bias_sample_flag:-True}                      # random: the largest of many
stage1_sample_num=${stage1_sample_num:-400}                     # how many
extra_random_every=${extra_random_every:-3}                     # steps; a uniform one more; 0: never
sample_space=${sample_space:-released}                          # released or full
use_loss_expand=${use_loss_expand:-False}                       # losses weighted by size
crop_scale_min=${crop_scale_min:-0.08}
flip_prob=${flip_prob:-0.5}
freeze_bn=${freeze_bn:-True}                                    # train at the statistics given
bn_calibration_images=${bn_calibration_images:-auto}            # auto: 0 with freeze_bn, else 64
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
rank_gt=${rank_gt:-None}                                        # a truth: a file, or imagenet30
log_freq=${log_freq:-50}                                        # steps
visualdl_dir=${visualdl_dir:-None}                              # folder of curves
resume=${resume:-None}                                          # a folder, or auto
train_flag=${train_flag:-True}                                  # False: evaluate only
seed=${seed:-0}
device=${device:-auto}
. hnas/tools/launch.sh

launch train_supernet_pinas_stage2_simple.py run \
    --backbone "$backbone" --image_size "$image_size" --max_epoch "$max_epoch" \
    --batch_size "$batch_size" --dyna_batch_size "$dyna_batch_size" --lr "$lr" \
    --warmup "$warmup" --weight_decay "$weight_decay" --momentum "$momentum" \
    --sample_method "$sample_method" --bias_sample_flag "$bias_sample_flag" \
    --stage1_sample_num "$stage1_sample_num" --extra_random_every "$extra_random_every" \
    --sample_space "$sample_space" --use_loss_expand "$use_loss_expand" \
    --freeze_bn "$freeze_bn" --bn_calibration_images "$bn_calibration_images" \
    --crop_scale_min "$crop_scale_min" --flip_prob "$flip_prob" \
    --pretrained "$pretrained" --use_ckpt "$use_ckpt" --ckpt_dir "$ckpt_dir" \
    --image_dir "$image_dir" --save_dir "$save_dir" \
    --amp "$amp" --accumulate "$accumulate" --clip_norm "$clip_norm" \
    --use_tensor_dataset "$use_tensor_dataset" --storage_size "$storage_size" \
    --cache_dir "$cache_dir" --visualdl_dir "$visualdl_dir" \
    --num_workers "$num_workers" \
    --save_freq "$save_freq" --save_steps "$save_steps" --keep "$keep" \
    --bad_images "$bad_images" --eval_freq "$eval_freq" --log_freq "$log_freq" \
    --rank_gt "$rank_gt" \
    --resume "$resume" --train_flag "$train_flag" --seed "$seed" --device "$device" "$@"
