"""`ParallelismConfig(cp_size=2)` in an unmodified Trainer, with FSDP2: the losses of one process."""

import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Trainer

from ..cli_models import tokenizer
from ..tiny import tiny_model
from .jobs import make_model
from .processes import SECONDS, check_two_gpus_train_as_one, run_on_ranks
from .trainer_jobs import (
    CASE,
    ROOT,
    fail_while_training,
    losses_of,
    resume_on_ranks,
    run_script,
    train,
    train_in_bf16,
    train_in_bf16_row_by_row,
    train_on_gpus,
    train_on_ranks,
)

pytest.importorskip("accelerate", minversion="1.10")


def test_two_ranks_train_and_evaluate_as_one(tmp_path):
    alone = losses_of(train(str(tmp_path / "alone")))
    assert len(alone) == 6
    for found in run_on_ranks(2, tmp_path, train_on_ranks, str(tmp_path / "ranks")):
        assert found == pytest.approx(alone, abs=1e-5), found


def test_two_ranks_accumulate_and_resume_as_one_and_their_model_loads_in_one(tmp_path):
    alone = train(str(tmp_path / "alone"), gradient_accumulation_steps=2)
    for found in run_on_ranks(2, tmp_path, resume_on_ranks, str(tmp_path)):
        assert found == pytest.approx(losses_of(alone), abs=1e-5), found
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    torch.testing.assert_close(saved.state_dict(), alone.model.state_dict(), atol=1e-5, rtol=1e-4)


def test_a_rank_that_fails_ends_the_training_of_the_others_with_its_reason(tmp_path):
    first, second = run_on_ranks(2, tmp_path, fail_while_training, str(tmp_path / "run"))
    reason = "ArithmeticError: the second step is one too many"
    assert reason in second and f"PeerFailure: context_parallel ends because rank 1: {reason}" in first


@pytest.mark.slow
def test_torchrun_ends_with_the_reason(tmp_path):
    program = (
        "import os, torch.distributed as dist\n"
        "from hf.parallel.jobs import fail_on_one_rank\n"
        "dist.init_process_group('gloo')\n"
        "fail_on_one_rank(int(os.environ['RANK']))\n"
    )
    (tmp_path / "program.py").write_text(program)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "program.py"]
    paths = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "tests")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "FLASH_DMATTN_BACKEND": "reference"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=SECONDS)
    assert done.returncode and "ArithmeticError: the second layer is tired" in done.stderr


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["as it is", "compiled"])
def test_the_training_script_shares_sequences(tmp_path, compiled):
    (tmp_path / "text.txt").write_text("".join(f"line {i} of {i * i}\n" for i in range(60)))
    tiny_model("llama", initializer_range=0.3).save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    given = str(tmp_path / "model"), str(tmp_path / "text.txt")
    options = ["training.torch_compile=true", "training.torch_compile_backend=eager"] if compiled else []
    alone = run_on_ranks(1, tmp_path, run_script, *given, str(tmp_path / "alone"))[0]
    assert isinstance(alone, list) and len(alone) == 3, alone
    for found in run_on_ranks(2, tmp_path, run_script, *given, str(tmp_path / "ranks"), *options):
        assert found == pytest.approx(alone, abs=1e-5), found
    weights = load_file(tmp_path / "ranks" / "model.safetensors")
    for name, weight in load_file(tmp_path / "alone" / "model.safetensors").items():
        torch.testing.assert_close(weights[name], weight, atol=1e-5, rtol=1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_train_as_one(tmp_path):
    check_two_gpus_train_as_one(tmp_path, train_on_gpus)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_train_in_bf16_as_one_does_but_for_its_rounding(tmp_path):
    """What decides between two keys is rounded, too: even one GPU has other losses when it adds up otherwise."""
    alone, again = (
        run_on_ranks(1, make_folder(tmp_path / name), job, str(tmp_path / name / "run"), device="cuda")[0]
        for name, job in (("alone", train_in_bf16), ("again", train_in_bf16_row_by_row))
    )
    assert isinstance(alone, list) and isinstance(again, list) and len(alone) == len(again) == 6, (alone, again)
    noise = max(abs(one - other) for one, other in zip(alone, again, strict=True))
    assert noise < 5e-3, (alone, again)
    folder = make_folder(tmp_path / "both")
    for found in run_on_ranks(2, folder, train_in_bf16, str(folder / "run"), device="cuda"):
        assert found[0] == pytest.approx(alone[0], abs=1e-3), (found, alone)
        assert found == pytest.approx(alone, abs=3 * max(noise, 2e-3)), (found, alone, noise)


def make_folder(path: Path) -> Path:
    path.mkdir()
    return path


def prepare(inputs: dict, **sizes: int):
    """Calls the Trainer's preparation of inputs as it does in a step."""
    settings = types.SimpleNamespace(cp_size=1, sp_size=1, cp_backend="torch")
    vars(settings).update(sizes, cp_enabled=sizes.get("cp_size", 1) > 1)
    trainer = types.SimpleNamespace(
        accelerator=types.SimpleNamespace(parallelism_config=settings, maybe_context_parallel=print)
    )
    return Trainer._prepare_context_parallel_inputs(trainer, make_model(CASE), inputs)[1]


def batch(length: int = 8, **values) -> dict:
    input_ids = torch.arange(3, 3 + length)[None]
    return {"input_ids": input_ids, "labels": input_ids.clone(), **values}


def test_a_mask_of_ones_is_left_out_and_labels_are_shifted():
    found = prepare(batch(attention_mask=torch.ones(1, 8)), cp_size=2)
    assert "attention_mask" not in found
    assert found["shift_labels"].tolist() == [[*range(4, 11), -100]]


@pytest.mark.parametrize(
    ("values", "sizes", "sentence"),
    [
        ({"attention_mask": torch.tensor([[0, 1, 1, 1, 1, 1, 1, 1]])}, {"cp_size": 2}, "does not support padding"),
        ({"cu_seq_lens_q": torch.tensor([0, 3, 8])}, {"cp_size": 2}, "cu_seq_lens_q must come with position_ids"),
        ({"length": 9}, {"cp_size": 2}, "must be a multiple of the 2 ranks, got 9"),
        ({}, {"sp_size": 2}, "sp_size must be 1 with flash_dmattn, got 2"),
    ],
)
def test_what_cannot_be_cut_is_refused(values, sizes, sentence):
    with pytest.raises(ValueError, match=sentence):
        prepare(batch(**values), **sizes)
