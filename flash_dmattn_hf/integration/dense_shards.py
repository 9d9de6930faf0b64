"""Dense attention inside a `context_parallel` block: what a teacher predicts there, without gradients.

A dense query needs every key before it. So the ranks gather keys and values of one layer at a time, N Hkv (D + Dv)
numbers in all, which are given up after the layer. Sliding layers exchange their window alone.
"""

from typing import Any

import torch
from torch import nn

from flash_dmattn.dense.attention import dense_attention
from flash_dmattn.sink_logits import with_sinks
from flash_dmattn_hf.gates.eligibility import is_cross_attention
from flash_dmattn_hf.integration.attention import check_arguments, check_sinks, refuse_unsupported
from flash_dmattn_hf.integration.cross_attention import attend_to_others
from flash_dmattn_hf.integration.masks import tag_of
from flash_dmattn_hf.integration.shards import check_shard, windows_of_shard
from flash_dmattn_hf.parallel.attention import attend_shard
from flash_dmattn_hf.parallel.context import Shard
from flash_dmattn_hf.parallel.exchange import gather_from_ranks


@torch.compiler.disable
def dense_attention_on_ranks(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attends the rows of a rank to all keys before them, or to those of the layer's sliding window.

    query: (B, H, n, D). key: (B, Hkv, n, D), value: (B, Hkv, n, Dv). attention_mask: what `masks.dynamic_mask_mask`
    returned. dropout: of the training mode, in which a teacher never is.

    Returns out (B, n, H, Dv) and None. Raises ValueError for packed documents, where something would need a gradient,
    and for everything that would otherwise be ignored; RuntimeError outside of `context_parallel`.
    """
    if is_cross_attention(module):
        refuse_unsupported(module, kwargs)
        options = {"softcap": softcap, "s_aux": s_aux, **kwargs}
        return attend_to_others(module, query, key, value, attention_mask, scaling, dropout, **options)
    check_arguments(module, attention_mask, kwargs)
    tag = tag_of(attention_mask)
    shard = None if tag is None else tag.shard
    check_shard(shard, key, None, kwargs.get("cu_seq_lens_q"), None if tag is None else tag.limits.chunk_size)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (query, key, value)):
        raise ValueError("dense attention inside context_parallel has no gradient: run it under torch.no_grad()")
    query, key, value = (tensor.transpose(1, 2).to(value.dtype) for tensor in (query, key, value))
    options = {"softmax_scale": scaling, "softcap": softcap or 0.0}
    window = tag.limits.sliding_window
    if window is None:
        out, lse = attend_all(shard, query, key, value, **options)
    else:
        importance = torch.zeros((*key.shape[:1], key.shape[2], key.shape[1]), device=key.device)
        windows = windows_of_shard(getattr(module, "layer_idx", -1), window)
        options |= {"add_importance_bias": False, "return_lse": True}
        out, lse = attend_shard(shard, query, key, value, importance, windows, **options)
    if s_aux is not None:
        check_sinks(s_aux, query.shape[2], type(module).__name__)
        out = with_sinks(out, lse, s_aux, may_overwrite=True)
    return out, None


def attend_all(
    shard: Shard, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **options: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attends the rows of a rank to all keys up to their own, whose gathering takes memory for all of the sequence.

    query: (B, n, H, D). key, value: (B, n, Hkv, D), each with its own D. options: of `dense_attention`.
    Returns out (B, n, H, Dv) and lse (B, H, n). Raises ValueError for packed documents.
    """
    if shard.has_documents:
        raise ValueError("dense attention to packed documents is not supported inside context_parallel")
    before = [
        gather_from_ranks(shard.context, states.contiguous())[: shard.context.rank + 1].transpose(0, 1).flatten(1, 2)
        for states in (key, value)
    ]
    return dense_attention(query, *before, is_causal=True, **options)
