"""Attention to other tokens than the text's own, such as those of an encoder or an image: as sdpa computes it."""

from typing import Any

import torch
from torch import nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from flash_dmattn_hf.cache.handover import hand_over


def attend_to_others(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None,
    dropout: float,
    *,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Returns out (B, T, H, D) and None.

    query: (B, H, T, D). key, value: (B, Hkv, S, D). attention_mask: (B, 1 or H, T, S), what the model made itself, or
    None: every query sees all keys. Raises ValueError for a mask of another shape, for a softcap and attention sinks,
    which sdpa does not have, and for keys that went into a cache of constant size.
    """
    name = type(module).__name__
    if hand_over.has_offer:
        hand_over.withdraw()
        raise ValueError(
            f"{name} keeps the keys of other tokens in the layers of the text, which a DynamicMaskCache does not hold: "
            "pass use_cache=False, or an EncoderDecoderCache"
        )
    if softcap or s_aux is not None:
        what = "a softcap" if softcap else "attention sinks"
        raise ValueError(f"{name} attends to other tokens with {what}, which flash_dmattn does not support")
    if attention_mask is not None and attention_mask.dim() != 4:
        raise ValueError(f"the mask of {name} must have shape (B, 1, T, S), got {tuple(attention_mask.shape)}")
    kwargs.pop("is_causal", None)
    return sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=False, **kwargs
    )
