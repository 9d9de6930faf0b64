#!/usr/bin/env bash
# Runs compute-sanitizer over small cases of the CUDA engine, which need the library, or of the Triton engine.
#   bash scripts/sanitize_cuda.sh [--triton] [TOOL ...]     memcheck and racecheck by default
set -euo pipefail

case "${1:-}" in
    -h | --help) sed -n '2,3s/^# //p' "$0"; exit 0 ;;
esac
cd "$(dirname "${BASH_SOURCE[0]}")/.."
command -v compute-sanitizer >/dev/null || { echo "compute-sanitizer is not in PATH: it comes with the CUDA toolkit" >&2; exit 1; }
watched=(--kernel-name kernel_substring=ward_kernel python scripts/small_attention.py)
if [ "${1:-}" = --triton ]; then
    shift
    export FLASH_DMATTN_DISABLE_CUDA=1
    watched=(python scripts/small_triton.py)
fi
[ $# -gt 0 ] || set -- memcheck racecheck
for tool in "$@"; do
    compute-sanitizer --tool "$tool" --error-exitcode 1 "${watched[@]}"
done
