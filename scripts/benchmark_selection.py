"""Times the selection (importance -> one interval per key) and checks it against the sorted definition first.

python scripts/benchmark_selection.py --json docs/benchmarks/selection_h100.json

With the CUDA library also the building of key lists for query tiles of 32 tokens, and both as CUDA graphs, which
leaves out the time of launching them.
"""

import argparse
import math

import torch

import flash_dmattn
from benchmark_report import environment, header, median_milliseconds, save_json
from flash_dmattn.backends.cuda import library, lists
from flash_dmattn.calls import AttentionCall

DRIFT = 90.0
"""How much the drifting importance rises from the first key to the last, against noise of standard deviation 1."""

FIGURES = (
    "milliseconds",
    "graph_milliseconds",
    "lists_milliseconds",
    "lists_graph_milliseconds",
    "nanoseconds_per_key_and_head",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seqlens", type=int, nargs="+", default=[4096, 8192, 16384, 32768])
    parser.add_argument("--num-heads", type=int, default=8)
    parser.add_argument("--keep-window-size", type=int, default=2048)
    parser.add_argument("--num-sink-tokens", type=int, default=0)
    parser.add_argument("--local-window-size", type=int, default=0)
    parser.add_argument("--importance", nargs="+", default=["iid"], choices=["iid", "drift"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", help="write the figures to this file")
    arguments = parser.parse_args()
    options = {
        "keep_window_size": arguments.keep_window_size,
        "num_sink_tokens": arguments.num_sink_tokens,
        "local_window_size": arguments.local_window_size,
    }

    where = environment(arguments.device)
    print(header(where))
    print(f"{arguments.num_heads} heads, {options}")
    titles = ("ms", "graph", "lists", "graph", "ns/key/head")
    print(f"{'keys':>8} {'importance':>10} " + " ".join(f"{title:>11}" for title in titles))
    generator = torch.Generator().manual_seed(arguments.seed)
    rows = []
    for seqlen in arguments.seqlens:
        noise = torch.randn(1, arguments.num_heads, seqlen, generator=generator).to(arguments.device)
        for kind in arguments.importance:
            importance = noise + torch.linspace(0, DRIFT, seqlen, device=arguments.device) if kind == "drift" else noise
            check(importance, **options)
            row = {"seqlen": seqlen, "importance": kind, **measure(importance, options, arguments)}
            rows.append(row)
            figures = (row.get(name, math.nan) for name in FIGURES)
            print(f"{seqlen:>8} {kind:>10} " + " ".join(f"{figure:>11.3f}" for figure in figures))
    if arguments.json:
        save_json(arguments.json, {"environment": where, "num_heads": arguments.num_heads, **options, "rows": rows})


def measure(importance: torch.Tensor, options: dict, arguments: argparse.Namespace) -> dict[str, float]:
    """Returns the times by the names of `FIGURES`; of lists and graphs only with the CUDA library."""

    def milliseconds(function) -> float:
        return median_milliseconds(function, arguments.device, runs=arguments.runs)

    def select():
        return flash_dmattn.select_visible(importance, **options)

    found = {"milliseconds": milliseconds(select)}
    found["nanoseconds_per_key_and_head"] = found["milliseconds"] * 1e6 / importance.numel()
    if library.why_not_on(importance.device) is None:
        call = list_call(importance, select(), options["keep_window_size"])

        def build():
            return lists.build_key_lists(call, 32)

        found["lists_milliseconds"] = milliseconds(build)
        for name, function in (("graph_milliseconds", select), ("lists_graph_milliseconds", build)):
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                function()
            found[name] = milliseconds(graph.replay)
    return found


def list_call(importance: torch.Tensor, visibility: flash_dmattn.Visibility, keep_window_size: int) -> AttentionCall:
    """Returns a causal call of as many queries as keys, as far as key lists look at it."""
    batch, heads, seqlen = importance.shape
    tokens = importance.new_empty(batch, seqlen, heads, 1)
    return AttentionCall.prepare(
        tokens, tokens, tokens, importance, visibility, query_start=0, max_visible=keep_window_size
    )


def check(importance: torch.Tensor, keep_window_size: int, num_sink_tokens: int, local_window_size: int) -> None:
    """Raises unless the intervals hold, at a few rows, the sinks, the local window and the sorted top of the rest."""
    seqlen = importance.shape[-1]
    birth, death = flash_dmattn.select_visible(
        importance,
        keep_window_size=keep_window_size,
        num_sink_tokens=num_sink_tokens,
        local_window_size=local_window_size,
    )
    contested = keep_window_size - num_sink_tokens - local_window_size
    for row in sorted({0, 1, keep_window_size - 1, keep_window_size, seqlen // 2, seqlen - 1}):
        if row >= seqlen:
            continue
        wanted = torch.zeros_like(importance, dtype=torch.bool)
        wanted[..., :num_sink_tokens] = True
        wanted[..., max(0, row + 1 - local_window_size) : row + 1] = True
        candidates = importance[..., num_sink_tokens : max(num_sink_tokens, row + 1 - local_window_size)]
        top = candidates.topk(min(contested, candidates.shape[-1])).indices + num_sink_tokens
        wanted.scatter_(-1, top, True)
        wanted[..., row + 1 :] = False
        if not torch.equal((birth <= row) & (row < death), wanted):
            raise RuntimeError(f"the intervals at row {row} of {seqlen} are not the top of the prefix")


if __name__ == "__main__":
    main()
