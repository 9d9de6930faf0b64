#!/usr/bin/env bash
# Runs tests/clients: libraries that people use with transformers, each compared with sdpa. Needs no GPU.
#
#   scripts/checks/clients.sh [--record FILE] [PYTEST_ARGUMENT...]
#
#   --record FILE   also writes the versions of the libraries and the outcome of every test there
#
# PYTHON chooses the interpreter (default python3), whose environment needs the extra: pip install -e '.[clients]'.
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
cd "$ROOT"
record=
case ${1:-} in
    -h | --help) sed -n '2,8p' "${BASH_SOURCE[0]}"; exit ;;
    --record) record=${2:?--record needs a file}; shift 2 ;;
esac

export FLASH_DMATTN_CLIENTS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
run() {
    "${PYTHON:-python3}" - <<'EOF'
from importlib import metadata

for name in ("torch", "transformers", "accelerate", "trl", "datasets", "peft", "lm_eval", "sentence-transformers",
             "torchao", "bitsandbytes", "fastapi", "deepspeed"):
    try:
        print(f"{name:22} {metadata.version(name)}")
    except metadata.PackageNotFoundError:
        print(f"{name:22} not installed")
EOF
    "${PYTHON:-python3}" -m pytest -p no:cacheprovider -rA --tb=line -q --disable-warnings --show-capture=no tests/clients "$@"
}
if [[ -n $record ]]; then
    status=0
    run "$@" >"$record.full" || status=$?
    grep -E '^[a-z_-]+ +([0-9]|not installed)|^(PASSED|FAILED|SKIPPED|ERROR) |^[0-9]+ (passed|failed)|^=.* (passed|failed)' "$record.full" \
        | tee "$record"
    rm "$record.full"
    exit "$status"
fi
run "$@"
