"""Attention to other tokens than the text's own, such as those of an encoder or an image: as sdpa computes it."""

from typing import Any

import torch
from torch import nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward


def attend_to_others(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None,
    dropout: float,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Returns out (B, T, H, D) and None.

    query: (B, H, T, D). key, value: (B, Hkv, S, D). attention_mask: (B, 1 or H, T, S), what the model made itself, or
    None: every query sees all keys. Raises ValueError for a mask of another shape.
    """
    if attention_mask is not None and attention_mask.dim() != 4:
        raise ValueError(
            f"the mask of {type(module).__name__} must have shape (B, 1, T, S), got {tuple(attention_mask.shape)}"
        )
    kwargs.pop("is_causal", None)
    return sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=False, **kwargs
    )
