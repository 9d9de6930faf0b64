"""Times the selection (importance -> one interval per key) and checks it against the sorted definition first.

python scripts/benchmark_selection.py --json docs/benchmarks/selection_cpu.json
"""

import argparse

import torch

import flash_dmattn
from benchmark_report import environment, header, median_milliseconds, save_json


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seqlens", type=int, nargs="+", default=[4096, 8192, 16384, 32768])
    parser.add_argument("--num-heads", type=int, default=8)
    parser.add_argument("--keep-window-size", type=int, default=2048)
    parser.add_argument("--num-sink-tokens", type=int, default=0)
    parser.add_argument("--local-window-size", type=int, default=0)
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
    print(f"{'keys':>8} {'ms':>9} {'ns per key and head':>20}")
    generator = torch.Generator().manual_seed(arguments.seed)
    rows = []
    for seqlen in arguments.seqlens:
        importance = torch.randn(1, arguments.num_heads, seqlen, generator=generator).to(arguments.device)
        check(importance, **options)
        milliseconds = median_milliseconds(
            lambda importance=importance: flash_dmattn.select_visible(importance, **options),
            arguments.device,
            runs=arguments.runs,
        )
        per_key = milliseconds * 1e6 / (seqlen * arguments.num_heads)
        rows.append({"seqlen": seqlen, "milliseconds": milliseconds, "nanoseconds_per_key_and_head": per_key})
        print(f"{seqlen:>8} {milliseconds:>9.1f} {per_key:>20.1f}")
    if arguments.json:
        save_json(arguments.json, {"environment": where, "num_heads": arguments.num_heads, **options, "rows": rows})


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
