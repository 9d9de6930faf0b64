"""A temporary attention implementation that shows query, key and value of chosen attention modules."""

import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from flash_dmattn_hf.integration.uncompiled import eagerly

IMPLEMENTATION = "dmattn_observed"


@contextmanager
def observed_attention(modules: Collection[nn.Module], compute: Callable[..., torch.Tensor]) -> Iterator[None]:
    """Inside the block, `compute` is the attention of `modules`; all other modules attend as before.

    compute(module, query, key, value, softmax_scale, softcap): query (B, H, T, D) and key, value
    (B, Hkv, T, D) as the attention interface is given them, that is after rotary embeddings, in value's dtype; returns
    out (B, H, T, D). A compiled model runs its own code. It must be fed unpadded sequences: `compute` gets no mask.
    ValueError at the first layer of `modules` with attention sinks, which `compute` does not know of.
    """
    configs = {id(module.config): module.config for module in modules}.values()
    before = {config._attn_implementation for config in configs}
    if len(before) != 1:
        raise ValueError(f"the model's attention layers must share one implementation, got {sorted(before)}")
    (before,) = before

    def attention(module, query, key, value, attention_mask, scaling=None, **options):
        if module not in modules:
            eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
            original = ALL_ATTENTION_FUNCTIONS.get_interface(before, eager)
            return original(module, query, key, value, attention_mask, scaling=scaling, **options)
        if options.get("s_aux") is not None:
            raise ValueError(
                f"{type(module).__name__} has attention sinks (s_aux), whose layers cannot be calibrated or probed"
            )
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        query, key = query.to(value.dtype), key.to(value.dtype)  # autocast leaves rotated ones in float32
        out = compute(module, query, key, value, scaling, options.get("softcap"))
        return out.transpose(1, 2).contiguous(), None

    AttentionInterface.register(IMPLEMENTATION, attention)
    AttentionMaskInterface.register(IMPLEMENTATION, ALL_MASK_ATTENTION_FUNCTIONS[before])
    try:
        for config in configs:
            config._attn_implementation_internal = IMPLEMENTATION
        with eagerly:
            yield
    finally:
        for config in configs:
            config._attn_implementation_internal = before
        del AttentionInterface._global_mapping[IMPLEMENTATION]
        del AttentionMaskInterface._global_mapping[IMPLEMENTATION]
