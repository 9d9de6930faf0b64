"""One dense attention call: what every engine of this package is given."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class DenseCall:
    """The checked arguments of one attention under a mask and a bias.

    query: (B, Sq, H, D). key, value: (B, Sk, Hkv, D), query's dtype.
    attn_mask: (1 or B, 1 or Hkv or H, 1 or Sq, 1 or Sk), bool or floating point, zero hides a key; None hides nothing.
    attn_bias: of such a shape, floating point, added to the logits (NaN as -inf, +inf as the largest float32); or None.
    is_causal: query i sees no key after i + Sk - Sq.
    softmax_scale: factor of the dot product. softcap: 0 is off.
    deterministic: equal inputs must give bitwise equal gradients.
    tiles: what `TiledMask` knows of attn_mask, None when nothing is known.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    attn_mask: torch.Tensor | None
    attn_bias: torch.Tensor | None
    is_causal: bool
    softmax_scale: float
    softcap: float
    deterministic: bool
    tiles: torch.Tensor | None = None

    @property
    def group_size(self) -> int:
        return self.query.shape[2] // self.key.shape[2]

    @property
    def is_empty(self) -> bool:
        return self.query.numel() == 0 or self.key.shape[1] == 0
