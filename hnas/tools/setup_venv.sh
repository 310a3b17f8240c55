# Sourced by run_demo.sh and run_tests.sh, from the project's root: makes .venv and installs what
# the machine needs; gives $venv_python. Does nothing twice.

find_python() {
    for candidate in ${PYTHON:-python3.12 python3.11 python3.10 python3}; do
        if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "error: no Python 3.10 to 3.12 with venv found; install one or set PYTHON=/path/to/it" >&2
    exit 2
}

requirements=requirements-cpu.txt
if nvidia-smi >/dev/null 2>&1; then
    requirements=requirements.txt
fi
venv_python=.venv/bin/python
installed=.venv/installed-requirements.txt
if ! cmp -s "$requirements" "$installed" || ! "$venv_python" -c '' 2>/dev/null; then
    if ! "$venv_python" -c '' 2>/dev/null; then
        base_python=$(find_python) || exit 2
        echo "setting up .venv with $base_python"
        "$base_python" -m venv .venv || exit 2
    fi
    echo "installing $requirements into .venv"
    "$venv_python" -m pip install --quiet --disable-pip-version-check -r "$requirements" || exit 2
    cp "$requirements" "$installed"
fi
