#!/usr/bin/env bash
# Runs tests/clients: libraries that people use with transformers, each compared with sdpa, on the CPU.
#
#   scripts/checks/clients.sh                      all of them; docs/benchmarks/clients_cpu.txt becomes the record
#   scripts/checks/clients.sh --record FILE        all of them; FILE becomes the record
#   scripts/checks/clients.sh PYTEST_ARGUMENT...   what the arguments choose, without a record
#
# PYTHON chooses the interpreter (default python3), whose environment needs the extra: pip install -e '.[clients]'.
# The record says the versions, and of every test whether it passed, failed or was skipped, and why.
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
record=$ROOT/docs/benchmarks/clients_cpu.txt
command="scripts/checks/clients.sh${*:+ $*}"
case ${1:-} in
    -h | --help) sed -n '2,9p' "${BASH_SOURCE[0]}"; exit ;;
    --record)
        [[ $# == 2 ]] || { echo "error: --record needs one file, and no other arguments" >&2; exit 2; }
        record=$(realpath -- "$2"); shift 2 ;;
esac
cd "$ROOT"

export FLASH_DMATTN_CLIENTS=1 CUDA_VISIBLE_DEVICES= HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} PYTHONPATH=$ROOT:$ROOT/kernels${PYTHONPATH:+:$PYTHONPATH}
python=${PYTHON:-python3}
if [[ $# != 0 ]]; then
    exec "$python" -m pytest -p no:cacheprovider -q --disable-warnings tests/clients "$@"
fi
"$python" -m pytest -p no:cacheprovider -q --disable-warnings --tb=short \
    -p scripts.checks.clients_record --clients-record "$record" --clients-command "$command" tests/clients
