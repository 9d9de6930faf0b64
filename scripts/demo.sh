#!/usr/bin/env bash
# The main job on a fresh machine: SmolLM2-135M converted, measured, fine-tuned, saved and reloaded.
#
#   scripts/demo.sh [--quick | --long] [--model MODEL] [--output DIR] [--device DEVICE] [--dtype DTYPE]
#
# Makes its own virtual environment (FLASH_DMATTN_VENV, default .venv-demo) with PYTHON (default python3).
# --quick is the same path on less data; --long, for a GPU, on contexts of 8192 tokens, where --dtype bfloat16 is
# usual. Results: out/demo/results.json and demo.png.
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
source "$ROOT/scripts/ci/environment.sh"

if [[ ${1:-} == -h || ${1:-} == --help ]]; then
    sed -n '2,8p' "${BASH_SOURCE[0]}"
    exit
fi
venv=${FLASH_DMATTN_VENV:-$ROOT/.venv-demo}
ensure_environment "$venv" demo
exec env TOKENIZERS_PARALLELISM=false "$venv/bin/python" "$ROOT/scripts/demo.py" "$@"
