#!/usr/bin/env bash
# Runs compute-sanitizer over small cases of the CUDA library, its attention or its selection, or of the Triton backend.
#   bash scripts/checks/sanitize.sh [--selection | --triton] [TOOL ...] [-- OPTION ...]
# Tools are memcheck and racecheck by default; the options of scripts/checks/small_cases.py attention choose fewer cases.
set -euo pipefail

case "${1:-}" in
    -h | --help) sed -n '2,4s/^# //p' "$0"; exit 0 ;;
esac
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
command -v compute-sanitizer >/dev/null || { echo "compute-sanitizer is not in PATH: it comes with the CUDA toolkit" >&2; exit 1; }
cases=(python scripts/checks/small_cases.py)
watched=(--kernel-name kernel_substring=ward_kernel "${cases[@]}" attention)
case "${1:-}" in
    --selection) shift; watched=("${cases[@]}" selection) ;;
    --triton) shift; export FLASH_DMATTN_DISABLE_CUDA=1; watched=("${cases[@]}" triton) ;;
esac
tools=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do tools+=("$1"); shift; done
[ $# -eq 0 ] || shift
[ ${#tools[@]} -gt 0 ] || tools=(memcheck racecheck)
for tool in "${tools[@]}"; do
    echo "== $tool"
    compute-sanitizer --tool "$tool" --error-exitcode 1 "${watched[@]}" "$@"
done
