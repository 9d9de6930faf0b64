"""Small calls of every kernel of the Triton engine: what scripts/sanitize_cuda.sh --triton watches.

FLASH_DMATTN_DISABLE_CUDA=1 python scripts/small_triton.py
"""

import torch

import flash_dmattn
from flash_dmattn.slots import decode_step, make_slots, refresh_victims

CALLS = (
    {"keep_window_size": 100},
    {"keep_window_size": 1000},
    {"keep_window_size": 100, "deterministic": True, "softcap": 5.0},
)
COMPETITION = {"num_sink_tokens": 2, "local_window_size": 8}


def main() -> None:
    for options in CALLS:
        query = torch.randn(1, 300, 6, 64, device="cuda", dtype=torch.bfloat16)
        key, value = torch.randn(2, 1, 300, 2, 64, device="cuda", dtype=torch.bfloat16)
        inputs = [x.requires_grad_() for x in (query, key, value, torch.randn(1, 2, 300, device="cuda"))]
        out = flash_dmattn.dynamic_mask_attention(*inputs, **options, backend="triton")
        results = out, *torch.autograd.grad(out, inputs, torch.randn_like(out))
        if not all(result.isfinite().all() for result in results):
            raise RuntimeError(f"{options}: not finite")
    slots = make_slots(1, 2, 128, 64, torch.bfloat16, "cuda")
    for state in (slots.keys, slots.values, slots.importance):
        state.normal_()
    slots.positions.copy_(torch.arange(128, device="cuda").expand_as(slots.positions))
    slots.lengths.fill_(128)
    refresh_victims(slots, **COMPETITION)
    for _ in range(2):
        query = torch.randn(1, 1, 6, 64, device="cuda", dtype=torch.bfloat16)
        key, value = torch.randn(2, 1, 1, 2, 64, device="cuda", dtype=torch.bfloat16)
        decode_step(query, key, value, torch.randn(1, 2, 1, device="cuda"), slots, **COMPETITION, backend="triton")
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
