"""accelerate with DDP, and FSDP2, in two processes over gloo: the losses are those of sdpa."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from .conftest import CHOICES

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_processes(dense, kind):
    losses = {}
    for name in CHOICES:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        command += ["-m", "tests.clients.train_in_processes", str(dense), name, kind]
        done = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        losses[name] = [float(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("loss")]
    assert len(losses["sdpa"]) == 3
    assert losses["flash_dmattn"] == pytest.approx(losses["sdpa"], abs=1e-4)
