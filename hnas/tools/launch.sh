# Sourced by the launchers: which processes a stage runs in. They give launch SCRIPT FLAGS.
gpus=${gpus:-}                                                  # 0,1,2,3: a process each
processes=${processes:-1}                                       # on CPUs, instead of gpus
nnodes=${nnodes:-1}                                             # machines
master=${master:-}                                              # HOST:PORT of the first one
node_rank=${node_rank:-}                                        # this one's number, from 0
python=${python:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}

local_processes=$processes
if [ -n "$gpus" ]; then
    local_processes=$(echo "$gpus" | tr , '\n' | grep -c .)
fi
cores=$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)
threads=${threads:-$((cores > local_processes ? cores / local_processes : 1))}

# Before Python starts: Paddle reads these when it is imported.
export OMP_NUM_THREADS="$threads" MKL_NUM_THREADS="$threads"
# Lets MKL use AVX2 on AMD's processors; on Intel's it would keep MKL from AVX-512.
if grep -q AuthenticAMD /proc/cpuinfo 2>/dev/null; then
    export MKL_DEBUG_CPU_TYPE=5
fi

refuse() {
    echo "error: $1" >&2
    exit 2
}

# launch SCRIPT FLAGS...: plain Python for one process, Paddle's launcher for several.
launch() {
    if [ -n "$gpus" ] && [ "$processes" != 1 ]; then
        refuse "gpus and processes are both set; processes is for CPUs"
    fi
    if [ "$nnodes" != 1 ] && { [ -z "$master" ] || [ -z "$node_rank" ]; }; then
        refuse "nnodes=$nnodes needs master=HOST:PORT, the same everywhere, and node_rank=0, 1, ..."
    fi
    if [ -n "$gpus" ]; then
        export CUDA_VISIBLE_DEVICES="$gpus"
    fi
    if [ "$local_processes" = 1 ] && [ "$nnodes" = 1 ]; then
        exec "$python" -u "$@"
    fi
    logs="$save_dir/log"
    if [ "$nnodes" != 1 ]; then
        # Each machine numbers its logs from 0.
        logs="$save_dir/log$node_rank"
        set -- --nnodes "$nnodes" --master "$master" --rank "$node_rank" "$@"
    fi
    exec "$python" -m paddle.distributed.launch --nproc_per_node "$local_processes" \
        --log_dir "$logs" --log_level WARNING "$@"
}
