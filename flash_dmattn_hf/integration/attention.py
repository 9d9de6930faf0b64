"""The attention function that transformers calls for `attn_implementation="flash_dmattn"`."""

from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache

from flash_dmattn import dynamic_mask_attention
from flash_dmattn.sink_logits import with_sinks
from flash_dmattn_hf.cache.eviction import view_of_slots
from flash_dmattn_hf.cache.handover import hand_over
from flash_dmattn_hf.config import Windows
from flash_dmattn_hf.gates.eligibility import chunk_size_of, is_causal, is_cross_attention, sliding_window_of
from flash_dmattn_hf.gates.importance import get_gate, importance_of
from flash_dmattn_hf.gates.soft_selection import soft_options
from flash_dmattn_hf.integration.blocks import last_blocks, read_blocks, refuse_unknown_prefix
from flash_dmattn_hf.integration.cross_attention import attend_to_others
from flash_dmattn_hf.integration.documents import Documents
from flash_dmattn_hf.integration.mask_functions import MaskLimits
from flash_dmattn_hf.integration.masks import is_marked, tag_of
from flash_dmattn_hf.integration.missing_gates import refuse_missing_gate
from flash_dmattn_hf.integration.native_windows import attend_natively
from flash_dmattn_hf.integration.packed_attention import attend_packed, find_documents
from flash_dmattn_hf.integration.served_attention import attend_served
from flash_dmattn_hf.integration.shards import check_shard, windows_of_shard
from flash_dmattn_hf.integration.shared_keys import SharedKeys, share, shared_with
from flash_dmattn_hf.parallel.attention import attend_shard
from flash_dmattn_hf.parallel.context import active

UNSUPPORTED = {
    "sinks": "attention sinks that depend on the token",
    "position_bias": "a position bias",
    "indices": "an indexer's indices",
    "block_indices": "an indexer's blocks",
    "cache": "a paged cache",
}
"""Arguments of an attention function that would change its result and that are not supported."""


def dynamic_mask_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    sliding_window: int | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    cu_seq_lens_k: torch.Tensor | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attends with the module's gate, or exactly as the layer's own causal attention if it has none.

    query: (B, H, T, D). key: (B, Hkv, S, D), value: (B, Hkv, S, Dv), S >= T, the queries last.
    dropout: of the attention weights, in training mode alone.
    attention_mask: what `masks.dynamic_mask_mask` returned.
    s_aux: (H,) logit of each head's attention sink, or None.

    Returns out (B, T, H, Dv) and None. Raises ValueError for anything that would otherwise be ignored.
    """
    if active.slot.content is not None and torch.compiler.is_compiling():
        return _attend_uncompiled(
            module, query, key, value, attention_mask, scaling, dropout, softcap, sliding_window, cu_seq_lens_q,
            cu_seq_lens_k, s_aux, **kwargs,
        )  # fmt: skip
    gate = get_gate(module)
    if gate is None and is_cross_attention(module):
        refuse_unsupported(module, kwargs)
        options = {"softcap": softcap, "s_aux": s_aux, **kwargs}
        return attend_to_others(module, query, key, value, attention_mask, scaling, dropout, **options)
    cache_layer = hand_over.take(gate, key, value)
    requests = getattr(kwargs.get("cache"), "live_requests", None)
    shared = shared_with(module, key) if getattr(module, "is_kv_shared_layer", False) else SharedKeys(gate)
    if shared.served is not None:  # which transformers passes to layers with keys of their own alone, from 5.24 on
        requests = shared.served[0]
    gate = shared.gate
    if gate is None:
        refuse_missing_gate(module)
        windows, chunk_size = Windows(max(key.shape[2], 1), 0, 0, sliding_window_of(module)), chunk_size_of(module)
    else:
        windows, chunk_size = gate.windows, None
    if requests is not None:
        kwargs.pop("cache", None)
        attention_mask = None  # every request sees its own tokens, whatever transformers passes for all
    tag, blocks = tag_of(attention_mask), None
    if is_marked(attention_mask):
        attention_mask, blocks = read_blocks(attention_mask, None if tag is None else tag.block_size)
    check_arguments(module, attention_mask, kwargs)
    if blocks is None and getattr(module, "is_causal", None) is False:
        refuse_unknown_prefix(module, query, attention_mask)
    if s_aux is not None:
        check_sinks(s_aux, query.shape[1], type(module).__name__)
    if requests is not None:
        if gate is not None:
            gate.was_called = True
        options = {"softmax_scale": scaling, "softcap": softcap or 0.0}
        return _with_sinks(attend_served(module, shared, requests, query, key, value, options), s_aux), None
    is_cached = cache_layer is not None or shared.view is not None
    is_step = is_cached and query.shape[2] == 1
    if not (is_step and tag is None):  # a static cache reduces the mask of one token
        _check_limits(module, MaskLimits(windows.sliding_window, chunk_size), sliding_window, attention_mask, tag)
    if tag is not None and tag.is_full and (is_cached or attention_mask.shape[1] <= key.shape[2]):
        attention_mask = None
    options = {"softmax_scale": scaling, "softcap": softcap or 0.0, "return_lse": s_aux is not None}
    if dropout and module.training:
        options["dropout_p"] = dropout
    shard = None if tag is None else tag.shard
    if shard is not None or active.slot.content is not None:
        check_shard(shard, key, cache_layer, cu_seq_lens_q, chunk_size)
    documents = None
    is_packed = cu_seq_lens_q is not None or (attention_mask is not None and attention_mask.dtype != torch.bool)
    if is_packed and shard is None:
        documents = find_documents(query, key, attention_mask, cu_seq_lens_q, cu_seq_lens_k)
    if documents is not None and blocks is not None:
        raise ValueError("bidirectional blocks, such as images, are not supported in packed documents")
    options["add_importance_bias"] = gate is not None and gate.config.add_importance_bias
    if gate is not None and not gate.was_called and not torch.compiler.is_compiling():
        gate.was_called = True
    if is_cached:
        _refuse_documents(documents)
        if shared.view is not None:
            num_visible = windows.keep_window_size if gate is not None else windows.sliding_window or chunk_size
            attended = shared.view.attend(query.transpose(1, 2), num_visible, **options)
        else:
            if gate is not None and gate.is_latent:
                cache_layer.receive(key, value)
            attended = _attend_cached(module, gate, cache_layer, query, key, attention_mask, blocks, options)
        return _with_sinks(attended, s_aux), None
    if gate is not None:
        _refuse_missing_keys(gate, query, key, attention_mask)
        importance = importance_of(gate, value) if shared.importance is None else shared.importance
        shared = SharedKeys(gate, importance=importance)
        if gate.soft_selections:
            options.update(soft_options(gate))
    if getattr(module, "store_full_length_kv", False):
        share(key, shared)
    is_padded = (attention_mask if documents is None else documents.padding_mask) is not None
    if chunk_size is not None or (gate is None and windows.sliding_window is not None and is_padded and shard is None):
        limits = MaskLimits(windows.sliding_window, chunk_size)
        numbers = {name: options[name] for name in ("softmax_scale", "softcap", "dropout_p") if name in options}
        attended = attend_natively(query, key, value, attention_mask, documents, blocks, limits, **numbers)
        return _with_sinks(attended, s_aux), None
    if gate is None:
        importance = torch.zeros(value.shape[:3], dtype=torch.float32, device=value.device)
    options["deterministic"] = torch.are_deterministic_algorithms_enabled()
    query, key = query.to(value.dtype), key.to(value.dtype)  # autocast leaves rotated ones in float32
    if shard is not None:
        states = (tensor.transpose(1, 2) for tensor in (query, key, value))
        if gate is None:
            windows = windows_of_shard(module.layer_idx, windows.sliding_window)
        return _with_sinks(attend_shard(shard, *states, importance, windows, **options), s_aux), None
    options.update(windows._asdict())
    if documents is not None:
        return _with_sinks(attend_packed(query, key, value, importance, documents, options), s_aux), None
    if blocks is not None:
        options["blocks"] = last_blocks(blocks, key.shape[2])
    padding_mask = None if attention_mask is None else attention_mask[:, -key.shape[2] :]
    attended = dynamic_mask_attention(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        importance,
        padding_mask=padding_mask,
        **options,
    )
    return _with_sinks(attended, s_aux), None


_attend_uncompiled = torch.compiler.disable(dynamic_mask_attention_forward)
"""What the layers of a compiled model call inside `context_parallel`: no graph can hold what a mask carries there."""


def _with_sinks(attended, s_aux: torch.Tensor | None) -> torch.Tensor:
    """Returns out (B, T, H, Dv), with sinks if there are some. attended: out, which nobody else has, or out and lse."""
    out, lse = attended if isinstance(attended, tuple) else (attended, None)
    return out if s_aux is None else with_sinks(out, lse, s_aux, may_overwrite=True)


def _attend_cached(module, gate, layer, query, key, attention_mask, blocks, options):
    """Attends over the survivors and the new tokens of a cache layer, and lets it evict. Returns out [, lse]."""
    padding_mask = None if attention_mask is None else attention_mask[:, -query.shape[2] :]
    is_shared = getattr(module, "store_full_length_kv", False)  # later layers use its keys
    if layer.takes_step and "dropout_p" not in options:
        attended = layer.step(query.transpose(1, 2), padding_mask, **options)
        view = view_of_slots(layer.slots, layer.dtype, layer.windows, padding_mask) if is_shared else None
    else:
        view = layer.view(padding_mask, None if blocks is None else last_blocks(blocks, query.shape[2]))
        attended = view.attend(query.transpose(1, 2), layer.windows.keep_window_size, **options)
        layer.evict()
    if is_shared:
        share(key, SharedKeys(gate, view=view))
    return attended


def check_arguments(module: nn.Module, attention_mask: torch.Tensor | None, kwargs: dict[str, Any]) -> None:
    """Raises ValueError for arguments of an attention function that would be ignored, or that no layer of ours has."""
    refuse_unsupported(module, kwargs)
    name = type(module).__name__
    if get_gate(module) is None and not is_causal(module):
        raise ValueError(f"{name} is not causal self-attention, which flash_dmattn does not support")
    if kwargs.get("is_causal") is False:
        raise ValueError(f"{name} asks for bidirectional attention, which flash_dmattn does not support")
    if attention_mask is not None and attention_mask.dim() != 2:
        raise ValueError(
            f"attention_mask must have shape (B, S) with flash_dmattn, got {tuple(attention_mask.shape)} in {name}: "
            "bidirectional and custom masks are not supported, nor is a model that writes its masks out"
        )


def check_sinks(sinks: torch.Tensor, num_heads: int, name: str) -> None:
    """Raises ValueError unless there is one sink logit per query head of a layer of this name."""
    if sinks.shape != (num_heads,):
        raise ValueError(f"s_aux of {name} must have shape ({num_heads},), got {tuple(sinks.shape)}")


def refuse_unsupported(module: nn.Module, kwargs: dict[str, Any]) -> None:
    """Raises ValueError for an argument that changes what any attention gives out, and that would be ignored."""
    for argument, meaning in UNSUPPORTED.items():
        given = kwargs.get(argument)
        if given is not None and not isinstance(given, Cache):  # a Cache has been updated by now; a paged one is none
            raise ValueError(f"{type(module).__name__} passes {meaning}, which flash_dmattn does not support")
    if kwargs.get("output_attentions"):
        raise ValueError('output_attentions=True needs attn_implementation="eager", got flash_dmattn')


def _check_limits(module, limits: MaskLimits, argument, attention_mask, tag) -> None:
    """Raises ValueError if the layer's window or chunk size, its argument and its mask do not say the same."""
    given = [limits._replace(sliding_window=argument)] if argument is not None else []
    if tag is not None:
        given.append(tag.limits)
    elif attention_mask is None and not given and not torch.compiler.is_compiling():
        given.append(MaskLimits())
    for other in given:
        for name, expected, found in zip(limits._fields, limits, other, strict=True):
            if found != expected:
                raise ValueError(
                    f"{name} of layer {module.layer_idx} must be {expected}, as its config says, got {found} from "
                    f"the forward of {type(module).__name__}"
                )


def _refuse_documents(documents: Documents | None) -> None:
    if documents is not None:
        raise ValueError("packed sequences cannot be combined with a DynamicMaskCache: pass use_cache=False")


def _refuse_missing_keys(gate, query: torch.Tensor, key: torch.Tensor, attention_mask: torch.Tensor | None) -> None:
    num_missing = 0 if attention_mask is None else attention_mask.shape[1] - key.shape[2]
    if num_missing > 0 and key.shape[2] == query.shape[2]:
        raise RuntimeError(
            f"layer {gate.layer_idx} must attend to {num_missing} cached tokens as well, but their cache did not reach "
            "its attention function: the layer did not update the cache in this call, or did so in another thread"
        )
    if num_missing > 0:
        raise ValueError(
            f"the cache of layer {gate.layer_idx} dropped {num_missing} keys that "
            "still compete for the window: use flash_dmattn_hf.DynamicMaskCache(model)"
        )
