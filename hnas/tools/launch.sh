# Sourced by the launchers, which then call launch SCRIPT FLAGS: which processes a stage runs in.
gpus=${gpus:-}                                                  # as 0,1: processes on visible GPUs
processes=${processes:-1}                                       # on CPUs, instead of gpus
threads=${threads:-}                                            # of each process; none: cores shared
nnodes=${nnodes:-1}                                             # machines
master=${master:-}                                              # HOST:PORT of the first machine
node_rank=${node_rank:-}                                        # this machine's number, from 0
python=${python:-}                                              # none: .venv's, or python3

refuse() {
    echo "error: $1" >&2
    exit 2
}

# whole NAME VALUE LEAST: VALUE is a whole number from LEAST to 9999.
whole() {
    case $2 in
        "" | *[!0-9]* | 0?* | ?????*) refuse "$1=$2 is not a whole number from $3 to 9999" ;;
    esac
    [ "$2" -ge "$3" ] || refuse "$1=$2 is too small; the least is $3"
}

# variables FILE...: the names of the variables that launchers take from the environment.
variables() {
    sed -n 's/^\([a-z0-9_]*\)=\${.*/\1/p' "$@"
}

# Variables of the environment that are none of the launchers', but nearly, or that are flags of
# the programs: "refuse NAME INSTEAD" where nothing else can be meant, else "warn NAME INSTEAD".
misspelt() {
    variables local_*.sh hnas/tools/launch.sh | awk '
        # Letters left out, put in, changed or exchanged with the next, least number of them.
        function distance(a, b,    i, j, d, least) {
            for (i = 0; i <= length(a); i++) d[i, 0] = i
            for (j = 0; j <= length(b); j++) d[0, j] = j
            for (i = 1; i <= length(a); i++) for (j = 1; j <= length(b); j++) {
                least = d[i - 1, j - 1] + (substr(a, i, 1) != substr(b, j, 1))
                if (d[i - 1, j] + 1 < least) least = d[i - 1, j] + 1
                if (d[i, j - 1] + 1 < least) least = d[i, j - 1] + 1
                if (i > 1 && j > 1 && substr(a, i - 1, 2) == substr(b, j, 1) substr(b, j - 1, 1) &&
                    d[i - 2, j - 2] + 1 < least) least = d[i - 2, j - 2] + 1
                d[i, j] = least
            }
            return d[length(a), length(b)]
        }
        NR == FNR { known[$1]; next }
        /^    [a-z0-9_]+: (str|int|float|bool) = / && !/= (search|single)\(/ {
            sub(/:/, "", $1)
            flags[$1]
        }
        END {
            for (name in ENVIRON) {
                if (name !~ /^[a-z][a-z0-9_]*$/ || name in known) continue
                if (name in flags) { print "warn", name, "--" name; continue }
                least = 99
                for (one in known) {
                    far = distance(name, one)
                    if (far <= length(one) / 4 && (far < least || far == least && one < nearest)) {
                        least = far
                        nearest = one
                    }
                }
                sure = least == 1 && nearest ~ /_/ && !(nearest in ENVIRON)
                if (least < 99) print (sure ? "refuse" : "warn"), name, nearest
            }
        }' - hnas/programs/options.py | sort
}

# Of launchers that start each other the first one looks.
if [ -z "${PINAS_THREADS:-}" ]; then
    misspelt | while read -r how name instead; do
        case $how$instead in
            warn--*) what="is a flag, not a variable; give $instead behind the launcher's name"
                [ "${0##*/}" != local_own.sh ] || what="is a flag, and no variable of local_own.sh" ;;
            *) what="is no variable of the launchers; did you mean $instead?" ;;
        esac
        [ "$how" = warn ] || refuse "$name $what If not, unset it"
        echo "warning: $name $what" >&2
    done || exit 2
fi
whole processes "$processes" 1
whole nnodes "$nnodes" 1
if [ -n "$threads" ]; then
    whole threads "$threads" 1
fi
local_processes=$processes
if [ -n "$gpus" ]; then
    case ,$gpus, in
        *[!0-9,]* | *,,* | *,0[0-9]* | *[0-9][0-9][0-9][0-9][0-9]*)
            refuse "gpus=$gpus is not a list of numbers as 0,1,2,3" ;;
    esac
    local_processes=$(echo "$gpus" | tr , '\n' | grep -c .)
    if [ "$(echo "$gpus" | tr , '\n' | sort -n | uniq | grep -c .)" != "$local_processes" ]; then
        refuse "gpus=$gpus names a GPU twice"
    fi
    # Who names cards does not want the CPU where Paddle sees none.
    if [ "${device:-auto}" = auto ]; then
        device=gpu
    fi
fi
if [ -z "$python" ]; then
    # Not by the link that .venv may be: a run stays in its environment when that is set anew.
    python=$([ -x .venv/bin/python ] && echo "$(cd -P ./.venv && pwd)/bin/python" || echo python3)
    [ "$python" != python3 ] || ! command -v python3 >/dev/null || python3 -c \
        'import importlib.util as found; raise SystemExit(not found.find_spec("paddle"))' ||
        refuse "there is no .venv, and python3 has no Paddle; sh hnas/tools/setup_venv.sh makes it"
fi
if [ -d "$python" ] || ! command -v "$python" >/dev/null 2>&1; then
    refuse "python=$python cannot be run; give the path of Python 3, or sh run_demo.sh makes .venv"
fi
# Left over from another run: Paddle would take them before what stands here.
for left in TRAINERS_NUM=1 TRAINER_ID=0 DEVICES= IPS= LOG_DIR= MASTER= NNODES= NPROC_PER_NODE= \
    RANK= RUN_MODE=; do
    name=PADDLE_${left%=*}
    eval "value=\${$name-${left#*=}}"
    [ "$value" = "${left#*=}" ] || refuse "$name=$value is left in the environment; unset it: \
processes, gpus and nnodes say how many"
done
cores=$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)
if [ -z "$threads" ]; then
    threads=$((cores > local_processes ? cores / local_processes : 1))
fi

# The programs take OpenMP's threads from PINAS_THREADS when they start: of any OMP_NUM_THREADS but
# 1 Paddle warns whenever it is imported. MKL reads its own variable.
# Nested launchers get threads as it is: nproc would count OMP_NUM_THREADS instead of the cores.
export threads PINAS_THREADS="$threads" MKL_NUM_THREADS="$threads" OMP_NUM_THREADS=1
# Lets MKL use AVX2 on AMD's processors; on Intel's it would keep MKL from AVX-512.
if grep -q AuthenticAMD /proc/cpuinfo 2>/dev/null; then
    export MKL_DEBUG_CPU_TYPE=5
fi

# What Paddle, PaddleSlim and setuptools say whenever they are imported, and Paddle of stage 3's
# operations, which have no weights and are compiled for CPUs. Other warnings stay.
quiet="ignore:No ccache found:UserWarning"
quiet="$quiet,ignore:Setuptools is replacing distutils:UserWarning"
quiet="$quiet,ignore:pkg_resources is deprecated as an API:UserWarning"
quiet="$quiet,ignore:no variable in your model:UserWarning"
quiet="$quiet,ignore:Tensor do not have 'contiguous' interface:UserWarning"
export PYTHONWARNINGS="$quiet${PYTHONWARNINGS:+,$PYTHONWARNINGS}"
# Paddle's C++ code: errors only; it warns of a method that stage 3 does not use.
export GLOG_minloglevel="${GLOG_minloglevel:-2}"

# The cards that gpus counts out, by the names that CUDA_VISIBLE_DEVICES has for them: numbers,
# UUIDs, parts of a card (MIG). CUDA reads that up to the first that is none.
chosen_cards() {
    if [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then
        visible=$(echo "$CUDA_VISIBLE_DEVICES" | tr -d ' ' | tr , '\n' |
            awk '!/^([0-9]+|(GPU|MIG)-.+)$/ { exit } { print }')
        why="CUDA_VISIBLE_DEVICES=$CUDA_VISIBLE_DEVICES leaves"
    else
        visible=$(nvidia-smi -L 2>/dev/null | grep '^GPU ' | awk '{ print NR - 1 }')
        why="nvidia-smi finds"
        if [ -z "$visible" ]; then
            echo "$gpus" # Paddle will tell
            return
        fi
    fi
    number=$(echo "$visible" | grep -c .) || :
    chosen=
    for index in $(echo "$gpus" | tr , ' '); do
        [ "$index" -lt "$number" ] || refuse "gpus=$gpus, but $why $number cards, counted from 0"
        chosen=$chosen${chosen:+,}$(echo "$visible" | sed -n "$((index + 1))p")
    done
    echo "$chosen"
}

# A folder for results; a home that a shell has left, ~/x, is found as the programs do.
check_save_dir() {
    case ${save_dir-} in
        None | False) refuse "save_dir=$save_dir: results need a folder" ;;
        "~/"*) save_dir=$HOME/${save_dir#"~/"} ;;
    esac
}

# launch SCRIPT FLAGS...: plain Python for one process, a launcher for several.
launch() {
    if [ -n "$gpus" ] && [ "$processes" != 1 ]; then
        refuse "gpus and processes are both set; processes is for CPUs"
    fi
    check_save_dir
    if [ "$nnodes" != 1 ]; then
        if [ -z "$master" ] || [ -z "$node_rank" ]; then
            refuse "nnodes=$nnodes needs master=HOST:PORT, the same everywhere, and \
node_rank=0, 1, ..."
        fi
        case ${master##*:} in
            "$master" | "" | *[!0-9]*) refuse "master=$master is not HOST:PORT" ;;
        esac
        whole node_rank "$node_rank" 0
        [ "$node_rank" -lt "$nnodes" ] || refuse "node_rank=$node_rank is not below nnodes=$nnodes"
    fi
    if [ -n "$gpus" ]; then
        CUDA_VISIBLE_DEVICES=$(chosen_cards) || exit 2
        export CUDA_VISIBLE_DEVICES
    elif [ "$processes" != 1 ]; then
        # Paddle's launcher gives every process a device of those that it sees, which it may run
        # out of. -1 is none, for each of them.
        CUDA_VISIBLE_DEVICES=$(seq "$processes" | sed 's/.*/-1/' | paste -sd , -)
        export CUDA_VISIBLE_DEVICES
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
    mkdir -p -- "$logs" 2>/dev/null || refuse "cannot make the folder $logs; choose another save_dir"
    exec "$python" -m hnas.parallel.launcher --nproc_per_node "$local_processes" \
        --log_dir "$logs" --log_level WARNING "$@"
}
