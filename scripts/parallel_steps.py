"""What the processes of `benchmark_parallel.py` do: training steps of one long sequence, on one rank or several."""

import contextlib
import functools
import gc
import os
import statistics
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, AttentionMaskInterface, LlamaConfig, LlamaForCausalLM

from flash_dmattn_hf import context_parallel, dynamic_mask_config, use_chunked_loss
from flash_dmattn_hf.parallel.exchange import Exchange

DENSE_BACKENDS = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION, "math": SDPBackend.MATH}
DENSE_NAME = "dense_sdpa"
WARMUP = {"flash_dmattn": 2**17, "sdpa": 2**15}
"""Tokens for each GPU of the step that warms up an engine, where its row has more: whole steps take long there."""
CHECKED_GRADIENTS = ("q_proj", "v_proj", "dma.A", "dma.dt_proj", "embed_tokens")
GIB = 2**30


def work(
    rank: int, num_gpus: int, parts: list[tuple[str, int]], settings: dict[str, Any], port: int, rows: Any
) -> None:
    """One process of a stage, which does its parts one after the other; rank 0 reports a row of each.

    parts: engine and tokens in all; the engines "check" and "exchange" are `check` and `time_exchange`.
    """
    device = settings["device"]
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    where = torch.device(device, rank) if device == "cuda" else torch.device("cpu")
    options = {"device_id": where} if device == "cuda" else {}
    if device == "cuda":
        torch.cuda.set_device(where)
    else:
        torch.set_num_threads(1)
    backend = "nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, rank=rank, world_size=num_gpus, timeout=timedelta(minutes=4), **options)
    model = optimizer = None
    for engine, tokens in parts:
        if engine == "check":
            row = check(settings, where)
        elif engine == "exchange":
            row = time_exchange(settings, where)
        else:
            if model is None:
                model = make_model(settings, where).train()
                model.gradient_checkpointing_enable({"use_reentrant": False})
                use_chunked_loss(model, engine="torch")
                optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
            row = measure(settings, model, optimizer, engine, tokens, where)
        if rank == 0:
            rows.put({"num_gpus": num_gpus, "engine": engine, "tokens": tokens, **row})
    rows.close()
    rows.join_thread()  # all rows are sent before threads of gloo can end a process
    dist.barrier()
    dist.destroy_process_group()


def make_model(settings: dict[str, Any], device: torch.device, **shape: int) -> LlamaForCausalLM:
    """The same random weights on every rank, in bf16. The importance is random, so that the selection is no window."""
    config = LlamaConfig(
        **{**settings["shape"], **shape},
        max_position_embeddings=2**24,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        tie_word_embeddings=True,
    )
    torch.manual_seed(settings["seed"])
    windows = {"keep_window_size": settings["keep_window_size"], "initializer_std": 1.0}
    with device, dynamic_mask_config(**windows):
        return LlamaForCausalLM._from_config(config, dtype=torch.bfloat16, attn_implementation="flash_dmattn")


def make_batch(settings: dict[str, Any], tokens: int, device: torch.device) -> dict[str, torch.Tensor]:
    """One sequence, the same on every rank, with everything that its shards need."""
    generator = torch.Generator(device).manual_seed(settings["seed"])
    input_ids = torch.randint(0, settings["shape"]["vocab_size"], (1, tokens), generator=generator, device=device)
    return {
        "input_ids": input_ids,
        "position_ids": torch.arange(tokens, device=device)[None],
        "labels": input_ids.clone(),
        "shift_labels": F.pad(input_ids, (0, 1), value=-100)[:, 1:].contiguous(),
        "num_items_in_batch": torch.tensor(tokens - 1, device=device),
        "use_cache": False,
    }


@contextlib.contextmanager
def sharded(engine: str, batch: dict[str, Any], traffic: list) -> Iterator[dict[str, Any]]:
    """Inside the block a forward of what is yielded attends to the rows of all ranks; adds what it sends to traffic."""
    if dist.get_world_size() == 1:
        yield batch
    elif engine == "flash_dmattn":
        with context_parallel() as context:
            yield context.shard(batch)
        traffic.append(context.traffic)
    else:
        from torch.distributed.tensor.experimental import context_parallel as ring

        mesh = dist.init_device_mesh(batch["input_ids"].device.type, (dist.get_world_size(),))
        buffers = {name: value.clone() for name, value in batch.items() if torch.is_tensor(value) and value.dim() == 2}
        with ring(mesh, buffers=[*buffers.values()], buffer_seq_dims=[1] * len(buffers),
                  no_restore_buffers={*buffers.values()}):  # fmt: skip
            yield {**batch, **buffers}


def measure(
    settings: dict[str, Any],
    model: LlamaForCausalLM,
    optimizer: torch.optim.Optimizer,
    engine: str,
    tokens: int,
    device: torch.device,
) -> dict[str, Any]:
    """Times whole steps, after one to warm up; the slowest rank counts."""
    world_size, is_dense = dist.get_world_size(), engine == "sdpa"
    if is_dense and world_size > 1 and device.type == "cpu":
        return {"skipped": "torch's context_parallel has no ring for CPUs"}
    is_longest = tokens == settings["longest"]
    runs = 1 if is_dense or is_longest else settings["runs"]
    model.set_attn_implementation(register_dense() if is_dense else engine)
    batch, times, traffic, row = make_batch(settings, tokens, device), [], [], {}
    warmup = make_batch(settings, min(tokens, WARMUP[engine] * world_size), device)
    with contextlib.ExitStack() as stack:
        if is_longest:
            stack.enter_context(tiled_mlp(model, settings["mlp_tile"]))
            row["mlp_tile"] = settings["mlp_tile"]
        if is_dense:
            row.update(choose_dense(settings, stack, device, lambda: step(model, optimizer, engine, warmup, [])))
        else:
            step(model, optimizer, engine, warmup, [])
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        for _ in range(runs):
            _synchronize(device)
            start = time.perf_counter()
            loss = step(model, optimizer, engine, batch, traffic)
            _synchronize(device)
            times.append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated() / GIB if device.type == "cuda" else 0.0
    if settings["profile"] and not is_dense:
        profile(settings, f"{engine}_{tokens}", lambda: step(model, optimizer, engine, batch, []))
    slowest = torch.tensor([statistics.median(times), peak], dtype=torch.float64, device=device)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    seconds, peak = slowest.tolist()
    row.update(runs=runs, milliseconds=1e3 * seconds, tokens_per_second_per_gpu=tokens / seconds / world_size)
    row.update(peak_gib=peak, loss=loss.item(), **exchanged(settings, engine, tokens, traffic))
    return row


def profile(settings: dict[str, Any], name: str, run: Callable[[], Any]) -> None:
    """Writes what one more step costs, operator by operator, to a file of this rank in the folder of the settings."""
    with torch.profiler.profile() as profiler:
        run()
    folder, world_size = Path(settings["profile"]), dist.get_world_size()
    folder.mkdir(parents=True, exist_ok=True)
    by = f"self_{settings['device']}_time_total"
    table = profiler.key_averages().table(sort_by=by, row_limit=60, max_name_column_width=90)
    (folder / f"{name}_rank_{dist.get_rank()}_of_{world_size}.txt").write_text(table)


@contextlib.contextmanager
def tiled_mlp(model: LlamaForCausalLM, tile: int) -> Iterator[None]:
    """Inside the block the MLPs take so many tokens at a time and compute each again in its backward.

    Their inner states are four times as wide as the model's, of which a long sequence leaves no room for all at once.
    """

    def tiled(forward: Callable, states: torch.Tensor) -> torch.Tensor:
        return torch.cat([checkpoint(forward, part, use_reentrant=False) for part in states.split(tile, 1)], 1)

    mlps = [layer.mlp for layer in model.model.layers]
    for mlp in mlps:
        mlp.forward = functools.partial(tiled, mlp.forward)
    try:
        yield
    finally:
        for mlp in mlps:
            del mlp.forward


def time_exchange(settings: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Times the exchange of one layer alone, forward only, and the sum of all gradients over the ranks."""
    shape, w, runs = settings["shape"], settings["keep_window_size"], 20
    heads, dim = shape["num_key_value_heads"], shape["head_dim"]
    states = [torch.zeros(1, w, heads, dim, dtype=torch.bfloat16, device=device) for _ in range(2)]
    numbers = [torch.zeros(1, heads, w, dtype=dtype, device=device) for dtype in (torch.float32, torch.int32)]
    query = torch.zeros(1, device=device)
    size = sum(parameter.numel() for parameter in make_model(settings, torch.device("meta")).parameters())
    gradients = torch.zeros(size, dtype=torch.bfloat16, device=device)
    context = context_parallel()
    calls = {"exchange": (lambda: Exchange(context, states, numbers).finish(query), runs)}
    calls["gradient_sum"] = (lambda: dist.all_reduce(gradients), 3)
    row = {}
    with context:
        for name, (call, count) in calls.items():
            call()
            _synchronize(device)
            start = time.perf_counter()
            for _ in range(count):
                call()
            _synchronize(device)
            row[f"{name}_milliseconds"] = (time.perf_counter() - start) * 1e3 / count
    sent = context.traffic.num_bytes // context.traffic.num_exchanges
    return {**row, "bytes_per_layer": sent, "gradient_bytes": gradients.numel() * gradients.element_size()}


def step(model, optimizer, engine: str, batch: dict[str, Any], traffic: list) -> torch.Tensor:
    """One training step; returns the loss of the whole sequence."""
    optimizer.zero_grad(set_to_none=True)
    with sharded(engine, batch, traffic) as own:
        loss = model(**own).loss
        loss.backward()
    loss = loss.detach()
    if dist.get_world_size() > 1:
        sums = [
            dist.all_reduce(parameter.grad, async_op=True)
            for parameter in model.parameters()
            if parameter.grad is not None
        ]
        dist.all_reduce(loss)
        for handle in sums:
            handle.wait()
    optimizer.step()
    return loss


def choose_dense(
    settings: dict[str, Any], stack: contextlib.ExitStack, device: torch.device, warm_up: Callable[[], Any]
) -> dict[str, Any]:
    """Enters the first way of dense attention that can run a step, and returns its name and what the others said."""
    name = "math" if device.type == "cpu" else settings["sdpa_backend"]
    refused = []
    for backend, repeats in ((name, False), (name, True), ("flash", True)):
        dense.repeats = repeats
        try:
            with sdpa_kernel(DENSE_BACKENDS[backend]):
                warm_up()
        except Exception as error:  # whatever it is, another way may run
            refused.append(f"{backend}, repeats {repeats}: {str(error)[:300]}")
            continue
        stack.enter_context(sdpa_kernel(DENSE_BACKENDS[backend]))
        return {"sdpa_backend": backend, "repeats_kv_heads": repeats, "refused": refused}
    raise RuntimeError(f"no dense attention can run: {refused}")


class DenseAttention:
    """Causal attention to all keys, as transformers' "sdpa" without a mask; torch's ring replaces the function here.

    repeats: whether keys and values are repeated for every query head, for a backend that knows no groups.
    """

    repeats = False

    def __call__(self, module, query, key, value, attention_mask, scaling=None, **_) -> tuple[torch.Tensor, None]:
        if self.repeats:
            key, value = (states.repeat_interleave(query.shape[1] // key.shape[1], 1) for states in (key, value))
        grouped = {"enable_gqa": True} if query.shape[1] != key.shape[1] else {}
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, **grouped)
        return out.transpose(1, 2).contiguous(), None


dense = DenseAttention()


def register_dense() -> str:
    """Makes it known to transformers, without any mask, and returns its name."""
    AttentionInterface.register(DENSE_NAME, dense)
    AttentionMaskInterface.register(DENSE_NAME, lambda *_, **__: None)
    return DENSE_NAME


def exchanged(settings: dict[str, Any], engine: str, tokens: int, traffic: list) -> dict[str, Any]:
    """Returns what a rank sends: counted for ours; for a ring computed, the keys and values of every other rank."""
    world_size, shape = dist.get_world_size(), settings["shape"]
    per_key = shape["num_key_value_heads"] * 2 * shape["head_dim"] * 2
    if engine == "sdpa":
        return {"computed_bytes_per_layer": (world_size - 1) * tokens // world_size * per_key}
    if not traffic:
        return {}
    last = traffic[-1]
    per_exchange = last.num_bytes // last.num_exchanges
    expected = settings["keep_window_size"] * (per_key + 8 * shape["num_key_value_heads"])
    if per_exchange != expected:
        raise RuntimeError(f"an exchange must have {expected} bytes, got {per_exchange}")
    return {
        "bytes_per_layer": per_exchange,
        "exchanges_per_step": last.num_exchanges,
        "gradient_bytes_per_step_of_rank_0": last.gradient_bytes,
    }


def check(settings: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Compares loss and gradients of the ranks together with those of one process, which every rank is here too.

    In float32 they must agree; in bf16 they must be as near to float32 as one process is.
    """
    shape = {"num_hidden_layers": min(4, settings["shape"]["num_hidden_layers"])}
    model = make_model(settings, device, **shape).train()
    batch = make_batch(settings, 4 * settings["keep_window_size"], device)
    rounded, got_rounded = both_ways(model, batch)
    for parameter in model.parameters():  # the frequencies of the rotary embedding are float32 already
        parameter.data, parameter.grad = parameter.data.float(), None
    exact, got = both_ways(model, batch)
    row = {"check": {}, "is_correct": True}
    for name, expected in exact.items():
        error, error_rounded, allowed = (
            float((each[name] - expected).norm() / expected.norm()) for each in (got, got_rounded, rounded)
        )
        row["check"][name] = {"float32": error, "bfloat16": error_rounded, "bfloat16_in_one_process": allowed}
        row["is_correct"] &= error <= 1e-2 and error_rounded <= 2 * allowed + 1e-2
    return row


def both_ways(model: LlamaForCausalLM, batch: dict[str, Any]) -> tuple[dict[str, torch.Tensor], ...]:
    """Returns loss and gradients of one process, and those of the ranks together."""
    one = loss_and_gradients(model, batch)
    with context_parallel() as context:
        together = loss_and_gradients(model, context.shard(batch))
    for tensor in together.values():
        dist.all_reduce(tensor)
    return one, together


def loss_and_gradients(model: LlamaForCausalLM, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
    model.zero_grad(set_to_none=True)
    loss = model(**batch).loss
    loss.backward()
    found = {"loss": loss.detach().float().clone()}
    for name, parameter in model.named_parameters():
        if any(part in name for part in CHECKED_GRADIENTS):
            found[name] = parameter.grad.float().clone()
    return found


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
    dist.barrier()
