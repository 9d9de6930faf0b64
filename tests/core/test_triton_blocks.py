"""The Triton kernels' block shapes fit GPUs other than the one they were measured on: compiled for them, not run."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is published for Linux only")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(platform.system() != "Linux", reason="Triton brings its assembler along on Linux only"),
]

GPUS = {"consumer": (89, 99 * 1024), "A100": (80, 163 * 1024), "H100": (90, 227 * 1024)}
SHAPES = {
    "consumer": [("bfloat16", 128), ("bfloat16", 256), ("float32", 256)],
    "A100": [("bfloat16", 256)],
    "H100": [("bfloat16", 128)],
}


KERNELS = {
    "compile_triton.py": {
        *("forward", "forward without lists", "dquery", "dkey, dvalue", "decode", "token importance"),
        *("forward with dropout", "dquery with dropout", "dkey, dvalue with dropout"),
        *("soft forward", "soft dquery", "soft dkey, dvalue", "soft cut", "soft cut backward"),
        *("sinks", "sinks backward"),
    },
    "compile_dense.py": {"classify", "forward", "dquery", "dkey, dvalue"},
}


@pytest.mark.parametrize(
    ("gpu", "dtype", "head_dim"), [(gpu, *shape) for gpu, shapes in SHAPES.items() for shape in shapes]
)
@pytest.mark.parametrize("compiler", KERNELS)
def test_every_kernel_fits_the_shared_memory(compiler, gpu, dtype, head_dim, tmp_path):
    capability, shared_memory = GPUS[gpu]
    script = Path(__file__).with_name(compiler)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, script, str(capability), str(shared_memory), dtype, str(head_dim)],
        capture_output=True,
        text=True,
        env={**environment, "TRITON_CACHE_DIR": str(tmp_path)},
    )
    assert run.returncode == 0, run.stderr[-2000:]
    taken = dict(line.rsplit(": ", 1) for line in run.stdout.splitlines())
    expected = KERNELS[compiler]
    if gpu != "A100" and compiler == "compile_triton.py":
        expected = expected | {"decode in 8 bits"}
    assert set(taken) == expected
    assert max(map(int, taken.values())) <= shared_memory, taken
