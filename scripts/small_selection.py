"""Small selections and key lists of the CUDA engine: what scripts/sanitize_cuda.sh --selection watches.

python scripts/small_selection.py
"""

import torch

from flash_dmattn import select_visible
from flash_dmattn.backends.cuda import library, lists
from flash_dmattn.calls import AttentionCall

SEQLEN = 1500
OPTIONS = (
    {"keep_window_size": 100},
    {"keep_window_size": 700, "num_sink_tokens": 4, "local_window_size": 300},
    {"keep_window_size": 200, "sliding_window": 500},
    {"keep_window_size": 200, "is_causal": False},
    {"keep_window_size": 2000},
)


def main() -> None:
    why_not = library.why_not_on(torch.device("cuda"))
    if why_not is not None:
        raise SystemExit(why_not)
    for options in OPTIONS:
        select_and_list(torch.randn(2, 3, SEQLEN), **options)
        mask = torch.rand(2, SEQLEN) < 0.8
        select_and_list(torch.randn(2, 3, SEQLEN), padding_mask=mask, **options)
        documents = torch.tensor([0, 3, 3, 700, 710, 1400, SEQLEN], dtype=torch.int32)
        select_and_list(torch.randn(1, 3, SEQLEN), cu_seqlens=documents, **options)
    cached = torch.rand(2, 3, 5000).argsort(-1)[..., :600].masked_fill(torch.rand(2, 3, 600) < 0.1, -1)
    chunk = torch.arange(5000, 5000 + SEQLEN - 600).expand(2, 3, -1)
    positions = torch.cat([cached, chunk], dim=-1).int()
    select_and_list(torch.randn(2, 3, SEQLEN), keep_window_size=601, positions=positions)
    print(f"{3 * len(OPTIONS) + 1} selections equal those of the CPU, and their lists were built")


def select_and_list(importance: torch.Tensor, **options) -> None:
    moved = {name: value.cuda() if isinstance(value, torch.Tensor) else value for name, value in options.items()}
    visibility = select_visible(importance.cuda(), **moved)
    expected = select_visible(importance, **options)
    if not all(torch.equal(got.cpu(), bound) for got, bound in zip(visibility, expected, strict=True)):
        raise RuntimeError(f"another selection than on the CPU: {options}")
    batch, heads, seqlen = importance.shape
    query, key = (torch.empty(batch, seqlen, heads, 8, device="cuda") for _ in range(2))
    for max_visible in (None, options["keep_window_size"]):
        if options.get("is_causal", True) or max_visible is None:
            call = AttentionCall.prepare(
                query, key, key, importance.cuda(), visibility, query_start=0, max_visible=max_visible
            )
            lists.build_key_lists(call, tile_size=32)
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
