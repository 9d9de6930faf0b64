"""Several CPU processes of one test, connected by gloo. All are forked from one that has imported everything."""

import multiprocessing
import os
import queue
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

_IMPORTED = [
    "flash_dmattn_hf",
    "accelerate",
    "transformers.models.auto.modeling_auto",
    "transformers.models.gemma2.modeling_gemma2",
    "transformers.models.llama.modeling_llama",
    "transformers.trainer",
]
"""What the first process imports for all; modules of the tests it could not find."""

SECONDS = 300
"""After this a test has failed."""


def run_on_ranks(world_size: int, folder: Any, function: Callable, *arguments: Any, device: str = "cpu") -> list:
    """Returns what function(rank, *arguments) returns on every rank, or the text of the error that it raised there.

    function: of a module that can be imported. folder: for the ranks to find each other, without a file "meeting".
    device: "cpu", connected by gloo and on the reference backend, or "cuda", one GPU for each rank, connected by nccl.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_IMPORTED)
    results = context.Queue()
    jobs = [
        context.Process(target=_job, args=(rank, world_size, str(folder), device, results, function, arguments))
        for rank in range(world_size)
    ]
    for job in jobs:
        job.start()
    found = {}
    try:
        while len(found) < world_size:
            rank, result = results.get(timeout=SECONDS)
            found[rank] = result
    except queue.Empty:
        raise TimeoutError(f"only ranks {sorted(found)} of {world_size} have ended: {found}") from None
    finally:
        for job in jobs:
            job.join(timeout=10)
            job.kill()
    return [found[rank] for rank in range(world_size)]


def check_two_gpus_train_as_one(folder: Path, train: Callable) -> None:
    """Asserts that train(rank, folder) gives the same six losses, to 1e-3, on two GPUs as on one."""
    (folder / "one").mkdir()
    (alone,) = run_on_ranks(1, folder / "one", train, str(folder / "alone"), device="cuda")
    assert isinstance(alone, list) and len(alone) == 6, alone
    for found in run_on_ranks(2, folder, train, str(folder / "both"), device="cuda"):
        assert found == pytest.approx(alone, abs=1e-3), found


def _job(rank, world_size, folder, device, results, function, arguments) -> None:
    if device == "cpu":
        os.environ["FLASH_DMATTN_BACKEND"] = "reference"
    else:
        torch.cuda.set_device(rank)
    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo" if device == "cpu" else "nccl",
            f"file://{folder}/meeting",
            timedelta(seconds=SECONDS),
            world_size=world_size,
            rank=rank,
        )
        results.put((rank, function(rank, *arguments)))
        results.close()
        results.join_thread()  # the result is sent before threads of gloo can end the process
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        results.put((rank, traceback.format_exc()))
        raise
