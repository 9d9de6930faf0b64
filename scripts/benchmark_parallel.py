"""Training steps of one long sequence on several GPUs: context parallelism, ours and torch's, correctness first.

    python scripts/benchmark_parallel.py --gpus 1 2 --json docs/benchmarks/parallel_h200.json

A row is a step of a Llama of 1B random weights in bf16: forward and backward with gradient checkpointing and chunked
loss, the sum of the gradients over the GPUs, and AdamW. Rows have a fixed number of tokens for each GPU, a fixed number
in all, and on the most GPUs some longer sequences. Before, several ranks are compared with one. Engines:

    flash_dmattn   `flash_dmattn_hf.context_parallel`; on one GPU the model alone
    sdpa           dense attention, by torch's context_parallel (a ring); on one GPU the model alone

The parts of a stage run in the same processes, and after each the JSON is written. A part that fails, or takes longer
than --part-seconds, is written down with its error, and the parts after it begin in new processes. No part begins after
--minutes. --quick runs all of it on CPUs with gloo, a tiny model and short sequences, where torch's ring cannot run.
"""

import argparse
import os
import queue
import socket
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmark_report import environment, header, load_json, save_json
from parallel_picture import draw
from parallel_steps import DENSE_BACKENDS, work

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
    "mlp_tile": 200,
    "shape": QUICK_SHAPE,
}
Part = tuple[str, int]
"""An engine and the tokens in all; "check" and "exchange" are engines too."""


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--tokens-per-gpu", type=int, default=2**17, help="where it is fixed")
    parser.add_argument("--tokens", type=int, default=2**18, help="in all, where they are fixed")
    parser.add_argument("--longer", type=int, nargs="*", default=[2**19], help="tokens of more rows on the most GPUs")
    parser.add_argument("--longest", type=int, default=2**20, help="tokens of one row in processes of its own; 0: none")
    parser.add_argument("--mlp-tile", type=int, default=2**16, help="tokens that an MLP takes at a time in that row")
    parser.add_argument("--sdpa-tokens", type=int, nargs="*", default=[2**18, 2**19], help="of dense attention")
    parser.add_argument("--sdpa-backend", default="cudnn", choices=DENSE_BACKENDS)
    parser.add_argument("--keep-window-size", type=int, default=2048)
    parser.add_argument("--runs", type=int, default=2, help="timed steps of a row; of the longest and of sdpa one")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=8.0, help="no part begins later, and none goes on after it")
    parser.add_argument("--part-seconds", type=float, default=180.0, help="longest time of a part, start included")
    parser.add_argument("--profile", metavar="FOLDER", help="write there what a step of each of our rows costs a rank")
    parser.add_argument("--quick", action="store_true", help="a tiny model on CPUs")
    parser.add_argument("--json", help="write the figures to this file, after every part")
    parser.add_argument("--png", help="draw them; needs --json and matplotlib")
    arguments = parser.parse_args(argv)
    settings = {**vars(arguments), "shape": SHAPE, **(QUICK if arguments.quick else {})}
    settings["device"] = device = "cpu" if arguments.quick else "cuda"
    if device == "cuda" and torch.cuda.device_count() < max(arguments.gpus):
        parser.error(f"--gpus must be at most the {torch.cuda.device_count()} there are, got {max(arguments.gpus)}")
    if arguments.png and not arguments.json:
        parser.error("--png needs --json")
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")  # before the processes start
    report = {"environment": environment(device), "settings": settings, "rows": []}
    if device == "cuda":
        report["memory_gib"] = torch.cuda.get_device_properties(0).total_memory / 2**30
    print(header(report["environment"]), settings, sep="\n", flush=True)
    _save(arguments.json, report)
    print(f"{'GPUs':>4} {'engine':>13} {'tokens':>8} {'ms':>9} {'tokens/s/GPU':>13} {'GiB':>6} {'loss':>8}", flush=True)
    deadline = time.monotonic() + 60 * arguments.minutes
    for num_gpus, parts in stages(settings):
        for row in rows_of_stage(num_gpus, parts, settings, deadline):
            report["rows"].append(row)
            add_efficiencies(report["rows"])
            print_row(row)
            _save(arguments.json, report)
    if arguments.png:
        try:
            draw(arguments.png, load_json(arguments.json))
        except Exception:  # the figures are written already
            traceback.print_exc()
    return report


def stages(settings: dict[str, Any]) -> Iterator[tuple[int, list[Part]]]:
    """Yields number of GPUs and parts of the stages in the order of what they tell; the last takes longest."""
    most = max(settings["gpus"])
    for num_gpus in settings["gpus"]:
        tokens = [settings["tokens_per_gpu"] * num_gpus, settings["tokens"]]
        tokens += settings["longer"] if num_gpus == most else []
        parts = [("flash_dmattn", number) for number in dict.fromkeys(tokens)]
        parts += [("sdpa", tokens[0])] if num_gpus == 1 and settings["sdpa_tokens"] else []
        before = [("check", 4 * settings["keep_window_size"]), ("exchange", 0)] if num_gpus > 1 else []
        yield num_gpus, before + parts
    if settings["longest"]:
        yield most, [("flash_dmattn", settings["longest"])]
    for tokens in settings["sdpa_tokens"]:
        yield most, [("sdpa", tokens)]


def rows_of_stage(
    num_gpus: int, parts: list[Part], settings: dict[str, Any], deadline: float
) -> Iterator[dict[str, Any]]:
    """Yields a row for every part: its figures, or why there are none.

    deadline: in seconds of time.monotonic().
    """
    while parts:
        done = 0
        try:
            if time.monotonic() > deadline:
                raise TimeoutError(f"the {settings['minutes']} minutes were over")
            for row in run_processes(num_gpus, parts, settings, deadline):
                yield row
                done += 1
        except Exception as error:
            traceback.print_exc()
            if done == len(parts):  # all have their rows: a process failed to end
                return
            engine, tokens = parts[done]
            row = {"num_gpus": num_gpus, "engine": engine, "tokens": tokens}
            yield {**row, "failed": f"{type(error).__name__}: {str(error)[-2000:]}"}
            done += 1
        parts = parts[done:]


def run_processes(
    num_gpus: int, parts: list[Part], settings: dict[str, Any], deadline: float
) -> Iterator[dict[str, Any]]:
    """Yields the rows of parts as new processes find them, which are gone when it ends.

    Raises what ended one of the processes, and TimeoutError if the next row takes too long.
    """
    context = torch.multiprocessing.get_context("spawn")
    rows, port = context.Queue(), _free_port()
    processes = torch.multiprocessing.start_processes(
        work, (num_gpus, parts, settings, port, rows), nprocs=num_gpus, join=False, start_method="spawn"
    )
    try:
        for engine, tokens in parts:
            limit = min(time.monotonic() + settings["part_seconds"], deadline)
            row, is_over, error = None, False, None
            while row is None:
                try:
                    row = rows.get(timeout=0.5)
                except queue.Empty:
                    if is_over:
                        what = f"the processes ended without a row for {engine} {tokens}"
                        raise error or RuntimeError(what) from None
                    if time.monotonic() > limit:
                        raise TimeoutError(f"{engine} with {tokens} tokens took too long") from None
                    try:
                        is_over = processes.join(timeout=0.1)
                    except Exception as ended:  # the row may have come before
                        is_over, error = True, ended
            yield row
        limit = min(time.monotonic() + 30, deadline)
        while not processes.join(timeout=0.5) and time.monotonic() < limit:
            pass
    finally:
        for process in processes.processes:
            process.kill()
            process.join()


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
            if (row["engine"], one["engine"]) == ("flash_dmattn", "sdpa"):
                if (one["num_gpus"], one["tokens"]) == (row["num_gpus"], row["tokens"]):
                    row["speedup_over_sdpa"] = one["milliseconds"] / row["milliseconds"]


def print_row(row: dict) -> None:
    name = f"{row['num_gpus']:>4} {row['engine']:>13} {row['tokens']:>8}"
    if "milliseconds" in row:
        speed, peak = row["tokens_per_second_per_gpu"], row["peak_gib"]
        print(f"{name} {row['milliseconds']:>9.0f} {speed:>13.0f} {peak:>6.1f} {row['loss']:>8.4f}", flush=True)
    elif "check" in row:
        worst = max(error["float32"] for error in row["check"].values())
        print(f"{name} {'right' if row['is_correct'] else 'WRONG'}, error in float32 {worst:.1e}", flush=True)
    elif "exchange_milliseconds" in row:
        print(f"{name} {row['exchange_milliseconds']:>9.3f} of {row['bytes_per_layer']} bytes", flush=True)
    else:
        print(f"{name} {row.get('skipped') or row['failed'].splitlines()[-1]}", flush=True)


def _save(path: str | None, report: dict) -> None:
    if path:
        save_json(Path(path), report)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


if __name__ == "__main__":
    main()
