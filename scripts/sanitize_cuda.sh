#!/usr/bin/env bash
# Runs compute-sanitizer over small cases of the CUDA engine, its attention or its selection, or of the Triton engine.
#   bash scripts/sanitize_cuda.sh [--selection | --triton] [TOOL ...] [-- OPTION ...]
# Tools are memcheck and racecheck by default; the options of scripts/small_attention.py choose fewer cases.
set -euo pipefail

case "${1:-}" in
    -h | --help) sed -n '2,4s/^# //p' "$0"; exit 0 ;;
esac
cd "$(dirname "${BASH_SOURCE[0]}")/.."
command -v compute-sanitizer >/dev/null || { echo "compute-sanitizer is not in PATH: it comes with the CUDA toolkit" >&2; exit 1; }
watched=(--kernel-name kernel_substring=ward_kernel python scripts/small_attention.py)
case "${1:-}" in
    --selection) shift; watched=(python scripts/small_selection.py) ;;
    --triton) shift; export FLASH_DMATTN_DISABLE_CUDA=1; watched=(python scripts/small_triton.py) ;;
esac
tools=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do tools+=("$1"); shift; done
[ $# -eq 0 ] || shift
[ ${#tools[@]} -gt 0 ] || tools=(memcheck racecheck)
for tool in "${tools[@]}"; do
    echo "== $tool"
    compute-sanitizer --tool "$tool" --error-exitcode 1 "${watched[@]}" "$@"
done
