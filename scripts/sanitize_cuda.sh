#!/usr/bin/env bash
# Runs compute-sanitizer over small cases of the CUDA engine: needs a GPU and the library.
#   bash scripts/sanitize_cuda.sh [TOOL ...]     memcheck and racecheck by default
set -euo pipefail

case "${1:-}" in
    -h | --help) sed -n '2,3s/^# //p' "$0"; exit 0 ;;
esac
cd "$(dirname "${BASH_SOURCE[0]}")/.."
command -v compute-sanitizer >/dev/null || { echo "compute-sanitizer is not in PATH: it comes with the CUDA toolkit" >&2; exit 1; }
[ $# -gt 0 ] || set -- memcheck racecheck
for tool in "$@"; do
    compute-sanitizer --tool "$tool" --error-exitcode 1 --kernel-name kernel_substring=ward_kernel \
        python scripts/small_attention.py
done
