"""DDP, FSDP2 and DeepSpeed ZeRO-3 in two processes over gloo: the losses are those of sdpa, and of one process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from flash_dmattn_hf import iter_gates

from .conftest import load
from .train_in_processes import SMALL, STEPS, batch, models, train

ROOT = Path(__file__).resolve().parents[2]
REFUSALS = [
    "in memory as a whole to be saved",
    "has unused model.layers.1.self_attn.dma",
    "the whole weight of the output layer",
]
"""What requests to a model with divided parameters are told."""


@pytest.fixture(scope="module")
def converted(dense, tmp_path_factory):
    """A folder with a converted checkpoint, whose importance chooses and is added to the logits."""
    path = tmp_path_factory.mktemp("converted")
    model = load(dense, "flash_dmattn")
    torch.manual_seed(5)
    with torch.no_grad():
        for _, _, gate in iter_gates(model):
            gate.A.uniform_(0.2, 1.0)
            gate.dt_proj.weight.normal_(0, 0.3)
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def alone(dense, converted):
    """What one process gets that is given the batches of both."""
    torch.manual_seed(0)
    return train(models(dense, converted)["converted"](), "alone", [0, 1])


def in_two_processes(dense, converted, kind, folder):
    """Runs train_in_processes.py in `folder`, and returns what it prints."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(ROOT / "tests/clients/train_in_processes.py"), str(dense), str(converted), kind]
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "DS_ACCELERATOR": "cpu", "DS_BUILD_OPS": "0"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("results ")]
    return json.loads(line.removeprefix("results "))


@pytest.mark.parametrize("kind", ["ddp", "fsdp", "zero3"])
def test_two_processes(dense, converted, alone, kind, tmp_path):
    if kind == "zero3":
        pytest.importorskip("deepspeed")
    results = in_two_processes(dense, converted, kind, tmp_path)
    dense_losses, losses = results["sdpa"]["losses"], results["flash_dmattn"]["losses"]
    assert len(dense_losses) == STEPS and dense_losses[0] != dense_losses[-1]
    assert losses == pytest.approx(dense_losses, abs=1e-5)
    assert results["flash_dmattn"]["tokens"] == results["sdpa"]["tokens"]
    assert results["converted"]["losses"] == pytest.approx(alone["losses"], abs=1e-5)
    assert results["converted"]["losses"] != pytest.approx(dense_losses, abs=1e-2)
    assert results["converted"]["tokens"] == alone["tokens"]
    for sentence, words in zip(results.get("refusals", []), REFUSALS, strict=kind == "zero3"):
        assert words in sentence


def test_a_trainer_with_zero3_saves_what_it_trained(dense, converted, tmp_path):
    pytest.importorskip("deepspeed")
    result = in_two_processes(dense, converted, "trainer", tmp_path)["converted"]
    assert len(result["losses"]) == STEPS
    saved = load(tmp_path / "trained", "flash_dmattn", flash_dmattn=SMALL).eval()
    ids = torch.cat([batch(STEPS, rank) for rank in (0, 1)])
    with torch.no_grad():
        assert saved(input_ids=ids, labels=ids).loss.item() == pytest.approx(result["evaluation"][0], abs=1e-5)
        before = load(converted, "flash_dmattn", flash_dmattn=SMALL).eval()
        assert before(input_ids=ids, labels=ids).loss.item() != pytest.approx(result["evaluation"][0], abs=1e-3)
    trained = {name: gate.A for name, _, gate in iter_gates(saved)}
    assert result["norms"][-1] == pytest.approx(torch.cat([*trained.values()]).norm().item(), rel=1e-4)
    assert all(not torch.equal(gate.A, trained[name]) for name, _, gate in iter_gates(before))
