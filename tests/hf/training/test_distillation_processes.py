"""Distillation in two processes: the weights of one process with the same batch, and one clock for both."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from .distil_in_processes import main

SCRIPT = Path(__file__).with_name("distil_in_processes.py")
ROOT = Path(__file__).resolve().parents[3]

pytestmark = pytest.mark.slow


def in_two_processes(folder: Path, *arguments) -> list[dict]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", SCRIPT, folder]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}
    subprocess.run([*map(str, command), *map(str, arguments)], check=True, env=environment, timeout=600)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(2)]


def test_two_processes_train_as_one(tmp_path):
    first, second = in_two_processes(tmp_path, 2)
    (tmp_path / "alone").mkdir()
    main(str(tmp_path / "alone"), 4)
    alone = torch.load(tmp_path / "alone" / "rank0.pt", weights_only=False)
    for name, weight in alone["weights"].items():
        assert torch.equal(first["weights"][name], second["weights"][name]), name
        torch.testing.assert_close(first["weights"][name], weight, atol=2e-5, rtol=1e-3)
    for name in ("kld", "top1"):
        got, expected = ([entry[name] for entry in run["log"] if name in entry] for run in (first, alone))
        assert got == pytest.approx(expected, rel=1e-3) and len(got) == 4
    assert any("held_out/kld" in entry for entry in first["log"])
    assert not any("held_out/kld" in entry for entry in second["log"])


def test_both_stop_at_the_same_step_when_the_time_is_over(tmp_path):
    first, second = in_two_processes(tmp_path, 2, 0.1)
    assert first["steps"] == second["steps"] > 1
    assert all(torch.equal(first["weights"][name], second["weights"][name]) for name in first["weights"])
