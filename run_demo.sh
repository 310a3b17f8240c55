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

echo "== data"
began=$(date +%s)
"$venv_python" -m hnas.tools.digits_folder --output "$demo/data"
echo "data $(($(date +%s) - began))" >"$demo/seconds.txt"

# All else is as the defaults of local_own.sh say. A mirrored digit is not that digit.
export python="$venv_python" image_dir="$demo/data" save_dir="$demo" backbone=resnet48_mini
export image_size=32 batch_size=32 flip_prob=0 num_workers=0 use_tensor_dataset=True log_freq=45
export codes=200
exec sh local_own.sh
