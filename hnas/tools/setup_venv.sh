# Sourced by run_demo.sh and run_tests.sh, or run by itself, from the project's root: makes an
# environment with what this machine needs; gives $venv and $venv_python. Does nothing twice.
#
# Paddle has two packages, for CPUs and for GPUs, which pip would put over each other. So there is
# an environment for each, .venv-cpu and .venv-gpu, and .venv is a link to the one in use. A .venv
# that is anything else, a directory or a link to elsewhere, is used as it is, for its own kind.
# device=cpu takes the package for CPUs on a machine with a GPU, too.

give_up() {
    echo "error: $1" >&2
    exit 2
}

find_python() {
    for candidate in ${PYTHON:-python3.12 python3.11 python3.10 python3}; do
        if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    give_up "no Python 3.10 to 3.12 with venv found; install one or set PYTHON=/path/to/it"
}

# Which of Paddle's packages $venv has; fails if its Python does not run.
paddle_packages() {
    "$venv_python" -c 'import importlib.metadata as m
print(*(n for n in ("paddlepaddle", "paddlepaddle-gpu") if any(m.distributions(name=n))))' 2>/dev/null
}

is_ready() {
    cmp -s "$requirements" "$installed" && [ "$(paddle_packages)" = "$package" ]
}

# The CUDA of the wheels that a file of requirements names: 126 for 12.6.
cuda_of() {
    sed -n 's|^--extra-index-url .*/cu\([0-9]*\)/*$|\1|p' "$1" 2>/dev/null
}

dotted() {
    echo "${1%?}.${1#??}"
}

# least CUDA: of the oldest driver that Paddle allows for its wheels; for 12.6 that is 550.54.14,
# for 11.8 450.80.02.
least() {
    case $1 in
        118) echo 110 ;;
        126) echo 124 ;;
        *) echo "${1:-0}" ;;
    esac
}

# A driver runs wheels of its own CUDA and of older ones; wheels for CPUs have none.
check_driver() {
    driver=$(echo "$cards" |
        sed -n 's/.*CUDA[A-Za-z ]*Version: *\([0-9][0-9]*\)\.\([0-9]\).*/\1\2/p' | head -n 1)
    if [ "${driver:-999}" -lt "$(least "$cuda")" ]; then
        advice="update the driver, or set device=cpu"
        for index in 118 126 129 130; do
            [ "$(least "$index")" -gt "$driver" ] ||
                advice="write cu$index for cu$cuda in $requirements, and run again"
        done
        give_up "$requirements has Paddle for CUDA $(dotted "$cuda"), and this machine's driver \
has $(dotted "$driver"); $advice"
    fi
}

# Makes $venv what $requirements asks for. Killed on its way it leaves $unfinished: pip would take
# half a package for a whole one.
set_up() {
    is_ready && return
    found=$(paddle_packages) || found=
    [ "$found" = "$package" ] || check_driver
    again=
    if [ -e "$unfinished" ]; then
        [ "$venv" = .venv ] && again=--force-reinstall || rm -rf "$venv"
    fi
    if ! paddle_packages >/dev/null; then
        base_python=$(find_python) || exit 2
        echo "setting up $venv with $base_python"
        { mkdir -p "$venv" && : >"$unfinished" && "$base_python" -m venv "$venv"; } || exit 2
        found=$(paddle_packages) || give_up "$venv_python does not run; remove $venv, run again"
    fi
    # Of two packages each has files of the other, so both go; so does one for another CUDA.
    before=$(cuda_of "$installed")
    [ "$found" != "$package" ] || [ "${before:-$cuda}" != "$cuda" ] || found=
    { : >"$unfinished" && rm -f "$installed"; } || exit 2
    echo "installing $requirements into $venv; for GPUs these are gigabytes"
    # pip shows what it loads. If it gives up by itself, no package is left by halves.
    if [ -n "$found" ] && ! "$venv_python" -m pip uninstall --yes $found ||
        ! "$venv_python" -m pip install --disable-pip-version-check $again -r "$requirements"; then
        rm -f "$unfinished"
        give_up "pip could not install $requirements into $venv; what it says stands above"
    fi
    said=$("$venv_python" -c 'import paddle
print("built for", f"gpu {paddle.version.cuda()}" if paddle.is_compiled_with_cuda() else "cpu")' \
        2>"$unfinished") || said=$(tail -n 1 "$unfinished")
    wanted="built for $kind${cuda:+ $(dotted "$cuda")}"
    case $said in
        *"$wanted"*) ;;
        *) give_up "Paddle in $venv is not $wanted: $said; remove $venv, and run again" ;;
    esac
    { cp "$requirements" "$installed" && rm -f "$unfinished"; } || exit 2
}

kind=cpu requirements=requirements-cpu.txt package=paddlepaddle other=paddlepaddle-gpu
if cards=$(nvidia-smi 2>/dev/null); then
    if [ "${device:-auto}" != cpu ]; then
        kind=gpu requirements=requirements.txt package=paddlepaddle-gpu other=paddlepaddle
    fi
elif [ "${device:-auto}" = gpu ]; then
    give_up "device=gpu, but nvidia-smi finds no GPU on this machine"
fi
cuda=$(cuda_of "$requirements")
venv=.venv-$kind lock=.venv-$kind.lock
link=$(readlink .venv) || link=
if [ "$link" = .venv-cpu ] || [ "$link" = .venv-gpu ]; then
    :
elif [ -e .venv ]; then
    venv=.venv lock=.venv/set-up.lock
elif [ -n "$link" ]; then
    give_up ".venv is a link to $link, which is not there; mend it, or remove the link"
fi
venv_python=$venv/bin/python installed=$venv/installed-requirements.txt
unfinished=$venv/set-up-unfinished
if ! is_ready; then
    if [ "$venv" = .venv ] && [ "$(paddle_packages)" = "$other" ]; then
        give_up ".venv has $other, and this machine needs $package; move it away (mv .venv \
.venv-old) and run again: each kind then has an environment of its own"
    fi
    # Other set-ups of this environment wait for this one, and then find nothing to do.
    (
        flock -n 9 || case $? in
            1) echo "waiting for another set-up of $venv" && flock 9 ;;
            *) echo "no locks on this disk: begin no other set-up meanwhile" ;;
        esac
        set_up
    ) 9>"$lock" || exit 2
fi
if [ "$venv" != .venv ] && [ "$link" != "$venv" ]; then
    { ln -s "$venv" ".venv-link.$$" && mv -fT ".venv-link.$$" .venv; } || exit 2
    echo ".venv is $venv now"
fi
