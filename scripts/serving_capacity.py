"""Parts of benchmark_serving.py: how many requests a memory holds, and what a snapshot of a long prefix costs."""

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import PreTrainedModel

from flash_dmattn_hf import DynamicMaskCache
from flash_dmattn_hf.cache import CacheSnapshot
from flash_dmattn_hf.serving.layers import served_layers
from flash_dmattn_hf.serving.live_requests import LiveRequests
from flash_dmattn_hf.serving.memory import bytes_per_request
from serving_load import GIB, Session, make_load, make_settings, run_load

RUNS = 20
QUESTION = 16


def live_requests(model: PreTrainedModel, args, deadline: float) -> dict:
    """Starts as many requests as `args.memory_gib` holds, all at once, and lets them all generate.

    Their prompts are one token, so that all start in one step and no time passes before all live; what a request takes
    and what a token costs does not depend on that.
    """
    model.set_attn_implementation("flash_dmattn")
    size = bytes_per_request(served_layers(model), model.dtype)
    count = int(args.memory_gib * GIB) // size
    if args.quick:
        count = min(count, 12)
    load = make_load(count, 1, args.new_tokens, model.config.vocab_size, None, args.seed)
    options = {"batch_tokens": max(args.batch_tokens, count), "requests": count, "num_blocks": count}
    settings = make_settings("flash_dmattn", memory_gib=1e6, **options)
    with Session(model, "flash_dmattn", settings, 1) as session:
        return {"room_for": count, "request_mib": size / 2**20, **run_load(session, load, deadline)}


@torch.no_grad()
def snapshot(model: PreTrainedModel, args, deadline: float) -> dict:
    """Times of a prefix of the longest prompt: processing it, snapshots of it, and first tokens with and without."""
    model.set_attn_implementation("flash_dmattn")
    length = max(args.prompts)
    prefix = make_load(1, length, 1, model.config.vocab_size, None, args.seed).prompts[0]
    ids, cache = torch.tensor([prefix], device=model.device), DynamicMaskCache(model)
    start = clock(model)
    for chunk in ids.split(args.batch_tokens, dim=1):
        model(chunk, past_key_values=cache, logits_to_keep=1)
    row = {"prompt": length, "prefill_s": clock(model) - start}
    taken = cache.snapshot()
    row["snapshot_mib"] = taken.nbytes / 2**20
    row["restore_ms"] = median_ms(model, lambda: taken.restore(model))
    layers = served_layers(model)
    pool = LiveRequests(layers, 2, model.dtype, model.device)
    row["copy_row_ms"] = median_ms(model, lambda: pool.copy(0, 1))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "prefix.safetensors"
        taken.save(path)
        row["load_and_restore_ms"] = median_ms(
            model, lambda: CacheSnapshot.load(path, model.device).restore(model), runs=3
        )
    return {**row, **first_tokens(model, args, prefix, deadline)}


def first_tokens(model: PreTrainedModel, args, prefix: list[int], deadline: float) -> dict:
    """Seconds to the first token of a request that brings the prefix, and of one that comes when it is known."""
    settings = make_settings(
        "flash_dmattn", memory_gib=args.memory_gib, batch_tokens=args.batch_tokens, requests=8, num_blocks=8,
        allow_block_sharing=True, page_size=256 if len(prefix) > 256 else 4,
    )  # fmt: skip
    found = {}
    with Session(model, "flash_dmattn", settings, QUESTION) as session:
        for names in (("cold", "together"), ("warm",)):
            for number, name in enumerate(names):
                session.send(name, [*prefix, *range(number + len(found), number + len(found) + QUESTION)], 2)
            while not found.keys() >= set(names) and time.perf_counter() < deadline:
                if (result := session.receive(1.0)) is not None:
                    found[result.request_id] = result.timestamps[0] - result.created_time
    return {"first_cold_s": found.get("cold"), "first_warm_s": found.get("warm")}


def clock(model: PreTrainedModel) -> float:
    if model.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def median_ms(model: PreTrainedModel, function: Callable[[], object], runs: int = RUNS) -> float:
    """Milliseconds from an idle device to an idle device; the first call is not counted."""
    times = []
    for _ in range(runs + 1):
        start = clock(model)
        function()
        times.append((clock(model) - start) * 1e3)
    return statistics.median(times[1:])
