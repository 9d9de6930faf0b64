"""Small forwards and backwards of the CUDA engine, one a kernel: what scripts/sanitize_cuda.sh watches.

python scripts/small_attention.py
"""

import itertools
import os

import torch

import flash_dmattn

HEAD_DIMS = (64, 96, 128, 192, 256)
ARCHITECTURES = ("", "80", "120")  # the GPU's own kernels, those for all GPUs in their two shapes


def main() -> None:
    for architecture, dtype, head_dim, softcap, window in itertools.product(
        ARCHITECTURES, (torch.bfloat16, torch.float16), HEAD_DIMS, (0.0, 5.0), (100, 1000)
    ):
        os.environ["FLASH_DMATTN_CUDA_ARCH"] = architecture
        query = torch.randn(1, 300, 6, head_dim, device="cuda", dtype=dtype)
        key, value = torch.randn(2, 1, 300, 2, head_dim, device="cuda", dtype=dtype)
        inputs = [x.requires_grad_() for x in (query, key, value, torch.randn(1, 2, 300, device="cuda"))]
        out = flash_dmattn.dynamic_mask_attention(*inputs, keep_window_size=window, softcap=softcap, backend="cuda")
        results = out, *torch.autograd.grad(out, inputs, torch.randn_like(out))
        if not all(result.isfinite().all() for result in results):
            raise RuntimeError(f"head dim {head_dim}, {dtype}, architecture {architecture!r}: not finite")


if __name__ == "__main__":
    main()
