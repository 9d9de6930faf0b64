"""Dynamic Mask Attention on plain tensors: the whole, its two halves, and any mask. Needs no model.

python examples/functional_api.py
"""

import torch

from flash_dmattn import dynamic_mask_attention, flash_dmattn_func, interval_attention, select_visible


def main() -> None:
    torch.manual_seed(0)
    query = torch.randn(1, 1000, 8, 64, requires_grad=True)  # (B, S, H, D)
    key, value = torch.randn(2, 1, 1000, 2, 64)  # 2 kv heads serve 8 query heads
    importance = torch.randn(1, 2, 1000, requires_grad=True)  # one number per key and kv head
    windows = {"keep_window_size": 128, "num_sink_tokens": 4, "local_window_size": 64}

    out = dynamic_mask_attention(query, key, value, importance, **windows)
    out.sum().backward()
    print("gradient of the importance:", importance.grad.abs().mean().item())

    # The same in two steps: which queries see which key, then attention over these intervals.
    birth, death = select_visible(importance, **windows)
    print("keys that row 700 of head 0 sees:", int(((birth <= 700) & (700 < death))[0, 0].sum()))
    again = interval_attention(query, key, value, importance, (birth, death))
    torch.testing.assert_close(again, out)

    mask = torch.rand(1, 1, 1000, 1000) > 0.5  # any mask, broadcast over heads
    print("out under a random mask:", tuple(flash_dmattn_func(query, key, value, attn_mask=mask, is_causal=True).shape))


if __name__ == "__main__":
    main()
