"""Serving under load: throughput, time to the first token and between tokens, memory; ours and dense in the same run.

    python scripts/benchmark_serving.py --json docs/benchmarks/serving.json --png docs/benchmarks/serving.png

A row is one engine, one length of prompts and one load on transformers' continuous batching in this process:

    all at once   every request comes at the start: the most that the engine can do
    0.8           Poisson arrivals at this share of the requests a second that the engine did when all came at once

Both have the same prompts of random tokens, which share no prefixes. Tokens of requests that have not finished when a
row's time is over count as well; `finished` says how many have, and `cut_off` that not all have. Engines get the same
memory for cache and forwards:

    flash_dmattn          one row of w slots a request, steps in CUDA graphs
    flash_dmattn-eager    the same without graphs
    flash_dmattn-prompts  the same, forwards with part of a prompt in CUDA graphs, too
    sdpa                  dense, pages of keys
    flash_attention_2     the same with FlashAttention; a row says so where neither flash-attn nor a hub kernel is there

Three more parts: "http", the 0.8 load of the shortest prompts through `flash-dmattn serve` on loopback; "live", as many
requests as the memory holds; "snapshot", what it costs to start from a prefix of the longest length.

The whole run ends within `--budget` seconds: a part gets its share of what is left, what was measured is saved after
every part, and a part that hangs ends the process. `--quick` runs a tiny model on a CPU.
"""

import argparse
import contextlib
import faulthandler
import gc
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmark_report import environment, header, save_json
from flash_dmattn_hf import dynamic_mask_config
from serving_capacity import live_requests, snapshot
from serving_http import run_http_load, running_server, save_checkpoint
from serving_load import (
    ENGINES,
    SHAPES,
    Load,
    Session,
    make_load,
    make_settings,
    number_of_requests,
    peak_gib,
    run_load,
)
from serving_picture import draw

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
QUICK = {
    "shape": "tiny", "prompts": [32, 128], "new_tokens": 8, "requests": 6, "keep_window_size": 32, "batch_tokens": 256,
    "dense_batch_tokens": 256, "memory_gib": 0.02, "budget": 240.0,
}  # fmt: skip
GRACE = 60.0
"""Seconds after its own limit until a part that does not end is taken for one that hangs."""


class Parts:
    """Runs one part after the other, each with its share of the seconds that are left, and saves what there is."""

    def __init__(self, report: dict, count: int, budget: float, path: str | None):
        self.report, self.left, self.path = report, count, path
        self.end = time.perf_counter() + budget

    def run(self, part: str, function: Callable[[float], dict], **labels: object) -> dict:
        """Adds the row that `function(deadline)` returns, or the error that it raises."""
        limit = max(0.0, self.end - time.perf_counter()) / self.left
        self.left -= 1
        faulthandler.dump_traceback_later(limit + GRACE, exit=True)
        start, row = time.perf_counter(), {"part": part, **labels}
        peak_gib()
        try:
            row.update(function(start + limit))
        except Exception as error:  # the other parts are worth their time
            row["failed"] = f"{type(error).__name__}: {error}".splitlines()[0]
        row["peak_gib"] = peak_gib()
        faulthandler.cancel_dump_traceback_later()
        self.report["rows"].append(row)
        if self.path:
            save_json(self.path, self.report)
        print(f"{time.perf_counter() - start:5.0f} s  " + "  ".join(map(shown, row.items())), flush=True)
        gc.collect()
        torch.cuda.empty_cache()
        return row


def shown(item: tuple[str, object]) -> str:
    name, value = item
    return f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"


def main() -> None:
    args = parse()
    names = ("http", "live", "snapshot")
    counted = 2 * len(args.prompts) * len(args.engines) + sum(name in args.parts for name in names)
    report = {"environment": environment(DEVICE), "settings": vars(args), "rows": []}
    print(header(report["environment"]))
    model = make_model(args)
    missing = {engine: reason for engine in args.engines if (reason := why_unavailable(model, engine))}
    report["rows"] += [{"part": "engine", "engine": name, "unavailable": why} for name, why in missing.items()]
    for engine, reason in missing.items():
        print(f"{engine} cannot run here: {reason}")
    counted -= 2 * len(args.prompts) * len(missing)
    parts, rates = Parts(report, counted, args.budget, args.json), {}
    for length in args.prompts:
        for engine in args.engines:
            if engine not in missing:
                rates[engine, length] = measure(parts, args, model, engine, length)
    if "live" in args.parts:
        parts.run("live", lambda deadline: live_requests(model, args, deadline))
    if "snapshot" in args.parts:
        parts.run("snapshot", lambda deadline: snapshot(model, args, deadline))
    if "http" in args.parts:
        rate = rates.get(("flash_dmattn", min(args.prompts)))
        parts.run("http", lambda deadline: through_http(model, args, rate, deadline), prompt=min(args.prompts))
    if args.png:
        draw(report, args.png)
    if any("failed" in row for row in report["rows"]):
        sys.exit("parts failed")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="1b", choices=SHAPES)
    parser.add_argument("--prompts", type=int, nargs="+", default=[2**11, 2**13, 2**15, 2**17], help="tokens each")
    parser.add_argument("--new-tokens", type=int, default=256)
    parser.add_argument("--requests", type=int, default=64, help="of a row at most")
    parser.add_argument("--tokens", type=int, default=2**20, help="of a row's prompts at most, but 4 requests")
    parser.add_argument("--load", type=float, default=0.8, help="share of the requests a second that an engine can do")
    parser.add_argument("--engines", nargs="+", default=["flash_dmattn", "sdpa", "flash_attention_2"], choices=ENGINES)
    parser.add_argument("--parts", nargs="*", default=["http", "live", "snapshot"], help="beside the engines' rows")
    parser.add_argument("--keep-window-size", type=int, default=2048)
    parser.add_argument("--memory-gib", type=float, default=70e9 / 2**30, help="for cache and forwards of an engine")
    parser.add_argument("--batch-tokens", type=int, default=2048, help="of a forward of ours at most: our default")
    parser.add_argument("--dense-batch-tokens", type=int, default=8192, help="of the others: transformers' default")
    parser.add_argument("--budget", type=float, default=420.0, help="seconds for the whole run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="a tiny model and short prompts, which a CPU can do")
    parser.add_argument("--json", help="write the figures to this file, after every part")
    parser.add_argument("--png", help="draw the rows against the length of prompts")
    args = parser.parse_args()
    if args.quick:
        vars(args).update(QUICK)
    return args


def make_model(args: argparse.Namespace) -> LlamaForCausalLM:
    """A Llama of random weights, in bfloat16 on a GPU and float32 on a CPU; engines take turns on it."""
    torch.manual_seed(args.seed)
    longest = max(args.prompts) + args.new_tokens + 64
    config = LlamaConfig(**SHAPES[args.shape], max_position_embeddings=longest, eos_token_id=None)
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float32
    with torch.device(DEVICE), dynamic_mask_config(keep_window_size=args.keep_window_size, initializer_std=1.0):
        return LlamaForCausalLM._from_config(config, attn_implementation="flash_dmattn", dtype=dtype).eval()


def why_unavailable(model: LlamaForCausalLM, engine: str) -> str | None:
    """Returns why an engine's attention cannot be had here, None if it can."""
    try:
        model.set_attn_implementation(ENGINES[engine][0])
    except Exception as error:  # whatever transformers raises for a package or kernel that is not there
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return None


def load_of(args: argparse.Namespace, length: int, rate: float | None) -> Load:
    count = number_of_requests(length, args.requests, args.tokens)
    return make_load(count, length, args.new_tokens, SHAPES[args.shape]["vocab_size"], rate, args.seed)


def measure(parts: Parts, args: argparse.Namespace, model: LlamaForCausalLM, engine: str, length: int) -> float | None:
    """Runs both loads of an engine; returns the requests a second of the second one, None if the first failed."""

    def serve(rate: float | None, deadline: float) -> dict:
        settings = make_settings(engine, memory_gib=args.memory_gib, batch_tokens=batch_tokens, requests=args.requests)
        with Session(model, engine, settings, min(length, 2 * batch_tokens)) as session:
            return run_load(session, load_of(args, length, rate), deadline)

    batch_tokens = args.batch_tokens if ENGINES[engine][0] == "flash_dmattn" else args.dense_batch_tokens
    labels = {"engine": engine, "batch_tokens": batch_tokens, "prompt": length}
    row = parts.run("load", lambda deadline: serve(None, deadline), **labels, load="all at once")
    if not row.get("tokens_per_s"):
        parts.left -= 1
        return None
    rate = args.load * row["tokens_per_s"] / args.new_tokens
    parts.run("load", lambda deadline: serve(rate, deadline), **labels, load=args.load, rate=rate)
    return rate


def through_http(model: LlamaForCausalLM, args: argparse.Namespace, rate: float | None, deadline: float) -> dict:
    """The load of the shortest prompts at `rate`, or all at once, by a server in another process."""
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        checkpoint = Path(folder) / "model"
        save_checkpoint(model, checkpoint)
        share = make_settings("flash_dmattn", memory_gib=args.memory_gib, batch_tokens=1, requests=1).max_memory_percent
        options = ["--memory-share", str(share), "--max-batch-tokens", str(args.batch_tokens)]
        log = Path(folder) / "log"
        port = stack.enter_context(running_server(checkpoint, options, log, deadline))
        load = load_of(args, min(args.prompts), rate)
        return {"rate": rate, **run_http_load(port, str(checkpoint), load, deadline, args.seed)}


if __name__ == "__main__":
    main()
