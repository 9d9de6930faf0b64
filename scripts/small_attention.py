"""Small forwards and backwards of the CUDA engine, one a kernel: what scripts/sanitize_cuda.sh watches.

python scripts/small_attention.py [--architectures own 80 120] [--head-dims 64 96 128 192 256] [--dtypes bf16 fp16]
"""

import argparse
import itertools
import os

import torch

import flash_dmattn
from flash_dmattn.backends.cuda import library

ARCHITECTURES = {"own": "", "80": "80", "120": "120"}  # the GPU's own kernels, the sm80 kernels in their two shapes
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architectures", nargs="+", choices=ARCHITECTURES, default=list(ARCHITECTURES))
    parser.add_argument("--head-dims", nargs="+", type=int, help="by default those that the library was built for")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--forward-only", action="store_true")
    arguments = parser.parse_args()
    head_dims = arguments.head_dims or library.head_dims()
    choices = arguments.architectures, arguments.dtypes, head_dims, (0.0, 5.0), (100, 1000)
    cases = list(itertools.product(*choices))
    for case in cases:
        run(*case, gradients=not arguments.forward_only)
    print(f"{len(cases)} cases, {'forward' if arguments.forward_only else 'forward and backward'}, all finite")


def run(architecture: str, dtype: str, head_dim: int, softcap: float, window: int, gradients: bool) -> None:
    os.environ["FLASH_DMATTN_CUDA_ARCH"] = ARCHITECTURES[architecture]
    query = torch.randn(1, 300, 6, head_dim, device="cuda", dtype=DTYPES[dtype])
    key, value = torch.randn(2, 1, 300, 2, head_dim, device="cuda", dtype=DTYPES[dtype])
    inputs = [x.requires_grad_() for x in (query, key, value, torch.randn(1, 2, 300, device="cuda"))]
    out = flash_dmattn.dynamic_mask_attention(*inputs, keep_window_size=window, softcap=softcap, backend="cuda")
    results = (out, *torch.autograd.grad(out, inputs, torch.randn_like(out))) if gradients else (out,)
    if not all(result.isfinite().all() for result in results):
        raise RuntimeError(f"head dim {head_dim}, {dtype}, architecture {architecture}: not finite")


if __name__ == "__main__":
    main()
