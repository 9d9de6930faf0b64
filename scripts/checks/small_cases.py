"""Small calls of every kernel: what scripts/checks/sanitize.sh watches.

    python scripts/checks/small_cases.py attention [--architectures own 80 120] [--head-dims 64 128] [--dtypes bf16]
    python scripts/checks/small_cases.py selection
    FLASH_DMATTN_DISABLE_CUDA=1 python scripts/checks/small_cases.py triton

attention: forwards and backwards of the CUDA library. selection: its selections, compared with those of the CPU, and
key lists. triton: forward, backward and decoding of the Triton backend.
"""

import argparse
import itertools
import os

import torch

import flash_dmattn
from flash_dmattn.backends.cuda import library, lists
from flash_dmattn.calls import AttentionCall
from flash_dmattn.float8 import NUMBERS
from flash_dmattn.slots import Slots, decode_step, make_slots, refresh_victims

ARCHITECTURES = {"own": "", "80": "80", "120": "120"}  # the GPU's own kernels, the sm80 kernels in their two shapes
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}

SELECTION_SEQLEN = 1500
SELECTIONS = (
    {"keep_window_size": 100},
    {"keep_window_size": 700, "num_sink_tokens": 4, "local_window_size": 300},
    {"keep_window_size": 200, "sliding_window": 500},
    {"keep_window_size": 200, "is_causal": False},
    {"keep_window_size": 2000},
)
TRITON_CALLS = (
    {"keep_window_size": 100},
    {"keep_window_size": 1000},
    {"keep_window_size": 100, "deterministic": True, "softcap": 5.0},
)
COMPETITION = {"num_sink_tokens": 2, "local_window_size": 8}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(dest="part", required=True)
    attention = parts.add_parser("attention")
    attention.add_argument("--architectures", nargs="+", choices=ARCHITECTURES, default=list(ARCHITECTURES))
    attention.add_argument("--head-dims", nargs="+", type=int, help="by default those that the library was built for")
    attention.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    attention.add_argument("--forward-only", action="store_true")
    parts.add_parser("selection")
    parts.add_parser("triton")
    arguments = parser.parse_args()
    {"attention": run_attention, "selection": run_selection, "triton": run_triton}[arguments.part](arguments)
    torch.cuda.synchronize()


def run_attention(arguments: argparse.Namespace) -> None:
    head_dims = arguments.head_dims or library.head_dims()
    choices = arguments.architectures, arguments.dtypes, head_dims, (0.0, 5.0), (100, 1000)
    cases = list(itertools.product(*choices))
    for architecture, dtype, head_dim, softcap, window in cases:
        os.environ["FLASH_DMATTN_CUDA_ARCH"] = ARCHITECTURES[architecture]
        options = {"keep_window_size": window, "softcap": softcap, "backend": "cuda"}
        attend(head_dim, DTYPES[dtype], not arguments.forward_only, architecture=architecture, **options)
    print(f"{len(cases)} cases, {'forward' if arguments.forward_only else 'forward and backward'}, all finite")


def attend(head_dim: int, dtype: torch.dtype, gradients: bool, architecture: str = "own", **options) -> None:
    """Runs one forward and, with `gradients`, its backward; raises RuntimeError for a result that is not finite."""
    query = torch.randn(1, 300, 6, head_dim, device="cuda", dtype=dtype)
    key, value = torch.randn(2, 1, 300, 2, head_dim, device="cuda", dtype=dtype)
    inputs = [x.requires_grad_() for x in (query, key, value, torch.randn(1, 2, 300, device="cuda"))]
    out = flash_dmattn.dynamic_mask_attention(*inputs, **options)
    results = (out, *torch.autograd.grad(out, inputs, torch.randn_like(out))) if gradients else (out,)
    if not all(result.isfinite().all() for result in results):
        raise RuntimeError(f"head dim {head_dim}, {dtype}, architecture {architecture}, {options}: not finite")


def run_selection(_: argparse.Namespace) -> None:
    why_not = library.why_not_on(torch.device("cuda"))
    if why_not is not None:
        raise SystemExit(why_not)
    seqlen = SELECTION_SEQLEN
    for options in SELECTIONS:
        select_and_list(torch.randn(2, 3, seqlen), **options)
        select_and_list(torch.randn(2, 3, seqlen), padding_mask=torch.rand(2, seqlen) < 0.8, **options)
        documents = torch.tensor([0, 3, 3, 700, 710, 1400, seqlen], dtype=torch.int32)
        select_and_list(torch.randn(1, 3, seqlen), cu_seqlens=documents, **options)
    cached = torch.rand(2, 3, 5000).argsort(-1)[..., :600].masked_fill(torch.rand(2, 3, 600) < 0.1, -1)
    chunk = torch.arange(5000, 5000 + seqlen - 600).expand(2, 3, -1)
    positions = torch.cat([cached, chunk], dim=-1).int()
    select_and_list(torch.randn(2, 3, seqlen), keep_window_size=601, positions=positions)
    print(f"{3 * len(SELECTIONS) + 1} selections equal those of the CPU, and their lists were built")


def select_and_list(importance: torch.Tensor, **options) -> None:
    """Selects on the GPU and builds key lists; raises RuntimeError for another selection than on the CPU."""
    moved = {name: value.cuda() if isinstance(value, torch.Tensor) else value for name, value in options.items()}
    visibility = flash_dmattn.select_visible(importance.cuda(), **moved)
    expected = flash_dmattn.select_visible(importance, **options)
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


def run_triton(_: argparse.Namespace) -> None:
    for options in TRITON_CALLS:
        attend(64, torch.bfloat16, gradients=True, backend="triton", **options)
    kinds = (None, NUMBERS) if torch.cuda.get_device_capability() >= (8, 9) else (None,)
    for slot_dtype in kinds:
        decode(make_slots(1, 2, 128, 64, torch.bfloat16, "cuda", slot_dtype=slot_dtype))


def decode(slots: Slots) -> None:
    """Two steps over slots that are full."""
    for states, scales in ((slots.keys, slots.key_scales), (slots.values, slots.value_scales)):
        states.copy_(torch.randn(states.shape, device="cuda"))
        scales.fill_(1)
    slots.importance.normal_()
    slots.positions.copy_(torch.arange(128, device="cuda").expand_as(slots.positions))
    slots.lengths.fill_(128)
    refresh_victims(slots, **COMPETITION)
    for _ in range(2):
        query = torch.randn(1, 1, 6, 64, device="cuda", dtype=torch.bfloat16)
        key, value = torch.randn(2, 1, 1, 2, 64, device="cuda", dtype=torch.bfloat16)
        decode_step(query, key, value, torch.randn(1, 2, 1, device="cuda"), slots, **COMPETITION, backend="triton")


if __name__ == "__main__":
    main()
