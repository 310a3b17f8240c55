#!/bin/sh
# All tests, after the same set-up as run_demo.sh. Arguments go to pytest.
set -eu
cd "$(dirname "$0")"
. hnas/tools/setup_venv.sh

if ! "$venv_python" -c 'import pytest, hypothesis, xdist, importlinter' 2>/dev/null ||
    [ ! -x "$venv/bin/ruff" ]; then
    "$venv_python" -m pip install --quiet --disable-pip-version-check \
        'pytest>=8' 'pytest-xdist>=3.5' 'hypothesis>=6.100' 'ruff>=0.6' 'import-linter>=2'
fi
# What few tests need, and users only for what they test. The tests say so where it is missing.
if ! "$venv_python" -c 'import ml_dtypes, onnxruntime, paddle2onnx, visualdl' 2>/dev/null; then
    "$venv_python" -m pip install --quiet --disable-pip-version-check \
        'paddle2onnx==2.1.0' 'onnxruntime>=1.20' 'ml_dtypes>=0.4' 'visualdl==2.5.3' 'numpy<2' ||
        echo "run_tests.sh: tests of ONNX and of VisualDL's files will be skipped" >&2
fi
# Most tests start programs, which keep one core busy: as many files at once as there are cores.
threads=${threads:-$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)}
workers=$((threads < 8 ? threads : 8))
each=$((threads / workers))
export OMP_NUM_THREADS="$each" MKL_NUM_THREADS="$each"

"$venv/bin/ruff" check .
"$venv/bin/ruff" format --check .
"$venv/bin/lint-imports" --no-cache
exec "$venv_python" -m pytest -n "$workers" --dist loadfile --no-loadscope-reorder "$@"
