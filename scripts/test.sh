#!/usr/bin/env bash
# Runs every test: the whole suite with the pinned transformers 5.23.0, then tests/hf again with 5.17.0 and with the newest.
#
#   scripts/test.sh [--no-venv] [--skip-5.17] [--skip-newest] [PYTEST_ARGUMENT...]
#
#   --no-venv      use the environment of $PYTHON (default python3) as it is; other versions go to folders beside it
#   --skip-5.17    leave out the second leg
#   --skip-newest  leave out the third leg, which asks the package index for the newest version
#
# What fails with a newest version that flash_dmattn_hf/versions.py does not name is reported, but is no failure here.
# PYTHON chooses the interpreter; FLASH_DMATTN_VENV the virtual environment (default .venv-test).
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
source "$ROOT/scripts/ci/environment.sh"
cd "$ROOT"

use_venv=true oldest_leg=true newest_leg=true
while [[ $# -gt 0 ]]; do
    case $1 in
        --no-venv) use_venv=false ;;
        --skip-5.17) oldest_leg=false ;;
        --skip-newest) newest_leg=false ;;
        -h | --help) sed -n '2,11p' "${BASH_SOURCE[0]}"; exit ;;
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

# Runs tests/hf with another version of transformers: leg VERSION [PYTEST_ARGUMENT...]
leg() {
    local version=$1 folder=$ROOT/.venv-transformers-$1 needs
    local path=$folder${PYTHONPATH:+:$PYTHONPATH}
    shift
    local pip=(env PIP_CONSTRAINT= "$python" -m pip install --quiet --no-deps --target "$folder")
    if [[ ! -f "$folder/complete" ]]; then
        rm -rf "$folder"
        "${pip[@]}" "transformers==$version" || return
        mapfile -t needs < <(PYTHONPATH=$path "$python" "$ROOT/scripts/ci/check_transformers.py" --unmet)
        ((${#needs[@]} == 0)) || "${pip[@]}" "${needs[@]}" || return
        touch "$folder/complete"
    fi
    PYTHONPATH=$path "$python" "$ROOT/scripts/ci/check_transformers.py" "$version" "$folder" || return
    echo "== integration tests, transformers $version"
    PYTHONPATH=$path "${pytest[@]}" tests/hf "$@"
}

version=$("$python" -c 'import transformers; print(transformers.__version__)')
echo "== tests, transformers $version, $workers workers"
"${pytest[@]}" tests "$@"

if $oldest_leg; then
    leg 5.17.0 "$@" || fail "the leg with transformers 5.17.0 failed; --skip-5.17 leaves it out"
else
    echo "== transformers 5.17.0: left out, as asked by --skip-5.17"
fi

if ! $newest_leg; then
    echo "== newest transformers: left out, as asked by --skip-newest"
    exit
fi
newest=$(PIP_CONSTRAINT="" "$python" "$ROOT/scripts/ci/newest_transformers.py") \
    || fail "the package index does not say which transformers is the newest; --skip-newest leaves this leg out"
echo "== newest transformers on the package index: $newest"
if leg "$newest" "$@"; then
    exit
fi
"$python" -c 'import sys; from flash_dmattn_hf.versions import is_covered; sys.exit(is_covered(sys.argv[1]))' "$newest" \
    || fail "the leg with the newest transformers, $newest, failed"
message="transformers $newest, newer than every tested version, breaks something: see above. This is no failure."
[[ -z ${GITHUB_ACTIONS:-} ]] || echo "::warning title=Newest transformers::$message"
echo "== $message"
