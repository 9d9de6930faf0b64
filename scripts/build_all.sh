#!/usr/bin/env bash
# Compiles the CUDA library for every architecture, head dim and dtype, and writes what each kernel needs.
#
#   scripts/build_all.sh [--quick]
#
#   --quick   one head dim and dtype of each kernel, for every architecture; only compiles and checks
#
# Places the library in kernels/flash_dmattn and the table in docs/benchmarks/build.txt. Fails when a kernel spills
# more than kernels/cuda_build/allowed_spills.txt grants. The variables of kernels/cuda_build/settings.py choose less
# than everything; PYTHON chooses the interpreter (default python3), which needs the package ninja or PATH the program.
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
case ${1:-} in
    -h | --help) sed -n '2,10p' "${BASH_SOURCE[0]}"; exit ;;
    --quick)
        export FLASH_DMATTN_HEAD_DIMS=128 FLASH_DMATTN_DTYPES=bf16
        arguments=("$ROOT/build/cuda-quick" --no-link --check-spills) ;;
    "") arguments=("$ROOT/build/cuda" --check-spills --copy-to "$ROOT/kernels/flash_dmattn"
                   --table "$ROOT/docs/benchmarks/build.txt") ;;
    *) echo "error: unknown option '$1'" >&2; exit 2 ;;
esac
unset FLASH_DMATTN_SKIP_CUDA_BUILD
export FLASH_DMATTN_CUDA_ARCHS=${FLASH_DMATTN_CUDA_ARCHS:-all}
export PYTHONPATH="$ROOT/kernels${PYTHONPATH:+:$PYTHONPATH}"
exec "${PYTHON:-python3}" -m cuda_build "${arguments[@]}"
