#!/usr/bin/env bash
# Runs every test: the whole suite with the pinned transformers 5.23.0, then tests/hf again with 5.17.0.
#
#   scripts/test.sh [--no-venv] [--skip-5.17] [PYTEST_ARGUMENT...]
#
#   --no-venv     use the environment of $PYTHON (default python3) as it is; 5.17.0 goes to a folder beside it
#   --skip-5.17   leave out the second leg, for environments whose packages 5.17.0 cannot use
#
# PYTHON chooses the interpreter; FLASH_DMATTN_VENV the virtual environment (default .venv-test).
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
source "$ROOT/scripts/ci/environment.sh"
cd "$ROOT"

use_venv=true second_leg=true
while [[ $# -gt 0 ]]; do
    case $1 in
        --no-venv) use_venv=false ;;
        --skip-5.17) second_leg=false ;;
        -h | --help) sed -n '2,9p' "${BASH_SOURCE[0]}"; exit ;;
        *) break ;;
    esac
    shift
done

venv=${FLASH_DMATTN_VENV:-$ROOT/.venv-test}
if $use_venv; then
    ensure_environment "$venv" dev
    python=$venv/bin/python
else
    python=$(command -v "${PYTHON:-python3}") || fail "no interpreter '${PYTHON:-python3}'; set PYTHON"
    require_python "$python"
    "$python" -c 'import flash_dmattn, flash_dmattn_hf, pytest, xdist' \
        || fail "the environment of $python lacks the package or its test tools: pip install -e '.[dev]'"
fi

# The tests use nothing from a network. One thread for each of the two pytest workers on two cores.
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
cores=$("$python" -c 'import os; print(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)')
workers=$((cores < 8 ? cores : 8))
export OMP_NUM_THREADS=$((cores / workers)) MKL_NUM_THREADS=$((cores / workers))
pytest=("$python" -m pytest -q -n "$workers" --dist worksteal --durations=15)

version=$("$python" -c 'import transformers; print(transformers.__version__)')
echo "== tests, transformers $version, $workers workers"
"${pytest[@]}" tests "$@"

if ! $second_leg; then
    echo "== transformers 5.17.0: left out, as asked by --skip-5.17"
    exit
fi

old=$ROOT/.venv-transformers-5.17.0
if [[ ! -f "$old/complete" ]]; then
    rm -rf "$old"
    PIP_CONSTRAINT="$ROOT/requirements/constraints-5.17.0.txt" \
        "$python" -m pip install --quiet --no-deps --target "$old" transformers==5.17.0
    touch "$old/complete"
fi
export PYTHONPATH="$old${PYTHONPATH:+:$PYTHONPATH}"
"$python" "$ROOT/scripts/ci/check_transformers.py" 5.17.0 "$old" \
    || fail "the second leg can't run in this environment; --skip-5.17 leaves it out"
echo "== integration tests, transformers 5.17.0"
"${pytest[@]}" tests/hf "$@"
