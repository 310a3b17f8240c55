#!/bin/sh
# All tests, after the same set-up as run_demo.sh. Arguments go to pytest.
set -eu
cd "$(dirname "$0")"
. hnas/tools/setup_venv.sh

if ! "$venv_python" -c 'import pytest, hypothesis, importlinter' 2>/dev/null ||
    [ ! -x .venv/bin/ruff ]; then
    "$venv_python" -m pip install --quiet --disable-pip-version-check \
        'pytest>=8' 'hypothesis>=6.100' 'ruff>=0.6' 'import-linter>=2'
fi
threads=${threads:-$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)}
export OMP_NUM_THREADS="$threads" MKL_NUM_THREADS="$threads"

.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/lint-imports --no-cache
exec "$venv_python" -m pytest "$@"
