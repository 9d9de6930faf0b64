"""Training steps of one long sequence on several GPUs: context parallelism, ours and torch's, correctness first.

    python scripts/benchmark_parallel.py --gpus 1 2 --json docs/benchmarks/parallel_h200.json

A row is a step of a Llama of 1B random weights in bf16: forward and backward with gradient checkpointing and chunked
loss, the sum of the gradients over the GPUs, and AdamW. Rows have a fixed number of tokens for each GPU, a fixed number
in all, and on the most GPUs some longer sequences. Before, several ranks are compared with one. Engines:

    flash_dmattn   `flash_dmattn_hf.context_parallel`; on one GPU the model alone
    sdpa           dense attention, by torch's context_parallel (a ring); on one GPU the model alone

Every stage runs in processes of its own, and the JSON is written after every row. --quick runs all of it on CPUs with
gloo, a tiny model and short sequences, where torch's ring cannot run.
"""

import argparse
import contextlib
import gc
import os
import socket
import statistics
import time
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface, AttentionMaskInterface, LlamaConfig, LlamaForCausalLM

from benchmark_report import environment, header, load_json, save_json
from flash_dmattn_hf import context_parallel, dynamic_mask_config, use_chunked_loss
from parallel_picture import draw

SHAPE = {
    "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64,
}  # fmt: skip
QUICK_SHAPE = {
    "vocab_size": 99, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
}  # fmt: skip
QUICK = {
    "tokens_per_gpu": 128,
    "tokens": 256,
    "longer": [512],
    "longest": 1024,
    "sdpa_tokens": [256],
    "keep_window_size": 16,
    "shape": QUICK_SHAPE,
}
DENSE_BACKENDS = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION, "math": SDPBackend.MATH}
DENSE_NAME = "dense_sdpa"
DENSE_WARMUP = 32768
"""Tokens for each GPU of the step that warms up dense attention: a whole step takes long."""
CHECKED_GRADIENTS = ("q_proj", "v_proj", "dma.A", "dma.dt_proj", "embed_tokens")
GIB = 2**30


class Stage(NamedTuple):
    """What one set of processes does: rows of (engine, tokens in all), after a check if there are several."""

    num_gpus: int
    rows: list[tuple[str, int]]
    is_checked: bool = False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--tokens-per-gpu", type=int, default=2**17, help="where it is fixed")
    parser.add_argument("--tokens", type=int, default=2**18, help="in all, where they are fixed")
    parser.add_argument("--longer", type=int, nargs="*", default=[2**19], help="tokens of more rows on the most GPUs")
    parser.add_argument("--longest", type=int, default=2**20, help="tokens of one row in processes of its own; 0: none")
    parser.add_argument("--sdpa-tokens", type=int, nargs="*", default=[2**18, 2**19], help="of dense attention")
    parser.add_argument("--sdpa-backend", default="cudnn", choices=DENSE_BACKENDS)
    parser.add_argument("--keep-window-size", type=int, default=2048)
    parser.add_argument("--runs", type=int, default=2, help="timed steps of a row; of the longest and of sdpa one")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="a tiny model on CPUs")
    parser.add_argument("--json", help="write the figures to this file, after every row")
    parser.add_argument("--png", help="draw them; needs --json and matplotlib")
    arguments = parser.parse_args()
    settings = {**vars(arguments), "shape": SHAPE, **(QUICK if arguments.quick else {})}
    device = "cpu" if arguments.quick else "cuda"
    if device == "cuda" and torch.cuda.device_count() < max(arguments.gpus):
        parser.error(f"--gpus must be at most the {torch.cuda.device_count()} there are, got {max(arguments.gpus)}")
    if arguments.png and not arguments.json:
        parser.error("--png needs --json")
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")  # before the processes start
    report = {"environment": environment(device), "settings": settings, "rows": []}
    print(header(report["environment"]), settings, sep="\n", flush=True)
    path = Path(arguments.json or os.devnull)
    _save(path, report)
    print(f"{'GPUs':>4} {'engine':>13} {'tokens':>8} {'ms':>9} {'tokens/s/GPU':>13} {'GiB':>6} {'loss':>8}", flush=True)
    for stage in stages(settings):
        start = time.perf_counter()
        try:
            rows = run_stage(stage, settings, device)
            for row in rows:
                report["rows"].append(row)
                add_efficiencies(report["rows"])
                print_row(report["rows"][-1])
                _save(path, report)
        except Exception as error:  # the next stages have processes of their own
            traceback.print_exc()
            report["rows"].append({**stage._asdict(), "failed": str(error)[-2000:]})
            _save(path, report)
        print(f"stage of {stage.num_gpus}: {time.perf_counter() - start:.0f} s", flush=True)
    if arguments.png:
        draw(arguments.png, load_json(path))


def stages(settings: dict[str, Any]) -> Iterator[Stage]:
    """The stages in the order of what they tell; the last is the one that takes longest."""
    most = max(settings["gpus"])
    for num_gpus in settings["gpus"]:
        tokens = [settings["tokens_per_gpu"] * num_gpus, settings["tokens"]]
        tokens += settings["longer"] if num_gpus == most else []
        rows = [("flash_dmattn", number) for number in dict.fromkeys(tokens)]
        rows += [("sdpa", tokens[0])] if num_gpus == 1 and settings["sdpa_tokens"] else []
        yield Stage(num_gpus, rows, is_checked=num_gpus > 1)
    if settings["longest"]:
        yield Stage(most, [("flash_dmattn", settings["longest"])])
    for tokens in settings["sdpa_tokens"]:
        yield Stage(most, [("sdpa", tokens)])


def run_stage(stage: Stage, settings: dict[str, Any], device: str) -> Iterator[dict]:
    """Yields the rows of a stage as its processes find them. Raises RuntimeError if one of them fails."""
    context = torch.multiprocessing.get_context("spawn")
    rows, port = context.Queue(), _free_port()
    processes = torch.multiprocessing.start_processes(
        work, (stage, settings, device, port, rows), nprocs=stage.num_gpus, join=False, start_method="spawn"
    )
    is_over = False
    while not is_over:
        is_over = processes.join(timeout=0.2)
        while not rows.empty():
            yield rows.get()
    time.sleep(0.2)
    while not rows.empty():
        yield rows.get()


def work(rank: int, stage: Stage, settings: dict[str, Any], device: str, port: int, rows: Any) -> None:
    """One process of a stage; rank 0 reports."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    where = torch.device(device, rank) if device == "cuda" else torch.device("cpu")
    options = {"device_id": where} if device == "cuda" else {}
    if device == "cuda":
        torch.cuda.set_device(where)
    else:
        torch.set_num_threads(1)
    backend = "nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, rank=rank, world_size=stage.num_gpus, timeout=timedelta(minutes=4), **options)
    if stage.is_checked:
        found = check(settings, where)
        if rank == 0:
            rows.put(found)
    model = make_model(settings, where).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    use_chunked_loss(model, engine="torch")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    for engine, tokens in stage.rows:
        row = measure(settings, model, optimizer, engine, tokens, where)
        if rank == 0:
            rows.put(row)
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
    row = {"num_gpus": world_size, "engine": engine, "tokens": tokens}
    if is_dense and world_size > 1 and device.type == "cpu":
        return {**row, "skipped": "torch's context_parallel has no ring for CPUs"}
    runs = 1 if is_dense or tokens == settings["longest"] else settings["runs"]
    model.set_attn_implementation(register_dense() if is_dense else engine)
    batch, times, traffic = make_batch(settings, tokens, device), [], []
    with contextlib.ExitStack() as stack:
        if is_dense:
            warmup = make_batch(settings, min(tokens, DENSE_WARMUP * world_size), device)
            row.update(choose_dense(settings, stack, device, lambda: step(model, optimizer, engine, warmup, [])))
        else:
            step(model, optimizer, engine, batch, [])
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
    slowest = torch.tensor([statistics.median(times), peak], dtype=torch.float64, device=device)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    seconds, peak = slowest.tolist()
    row.update(runs=runs, milliseconds=1e3 * seconds, tokens_per_second_per_gpu=tokens / seconds / world_size)
    row.update(peak_gib=peak, loss=loss.item(), **exchanged(settings, engine, tokens, traffic))
    return row


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
        except RuntimeError as error:
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
    row = {"num_gpus": dist.get_world_size(), "check": {}, "is_correct": True}
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


def add_efficiencies(rows: list[dict]) -> None:
    """Adds to our rows what share of the speed of one GPU every GPU has, at equal tokens for each GPU, and in all."""
    done = [row for row in rows if "milliseconds" in row]
    for row in done:
        for one in done:
            if one["engine"] == row["engine"] and one["num_gpus"] == 1 < row["num_gpus"]:
                ratio = row["tokens_per_second_per_gpu"] / one["tokens_per_second_per_gpu"]
                if one["tokens"] * row["num_gpus"] == row["tokens"]:
                    row["weak_scaling_efficiency"] = ratio
                if one["tokens"] == row["tokens"]:
                    row["strong_scaling_efficiency"] = ratio
            if {row["engine"], one["engine"]} == {"flash_dmattn", "sdpa"} and row["engine"] == "flash_dmattn":
                if (one["num_gpus"], one["tokens"]) == (row["num_gpus"], row["tokens"]):
                    row["speedup_over_sdpa"] = one["milliseconds"] / row["milliseconds"]


def print_row(row: dict) -> None:
    if "check" in row:
        worst = max(error["float32"] for error in row["check"].values())
        print(
            f"{row['num_gpus']:>4} {'right' if row['is_correct'] else 'WRONG'}, error in float32 {worst:.1e}",
            flush=True,
        )
        return
    name = f"{row['num_gpus']:>4} {row['engine']:>13} {row['tokens']:>8}"
    if "milliseconds" not in row:
        print(f"{name} {row['skipped']}", flush=True)
        return
    print(
        f"{name} {row['milliseconds']:>9.0f} {row['tokens_per_second_per_gpu']:>13.0f} {row['peak_gib']:>6.1f} "
        f"{row['loss']:>8.4f}",
        flush=True,
    )


def _save(path: Path, report: dict) -> None:
    if str(path) != os.devnull:
        save_json(path, report)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
    dist.barrier()


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


if __name__ == "__main__":
    main()
