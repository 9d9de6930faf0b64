"""Which layers a DynamicMaskCache of a model has."""

from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel, cache_utils
from transformers.cache_utils import (
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionLayer,
)

from flash_dmattn_hf.cache.hybrid import HybridCacheLayer
from flash_dmattn_hf.cache.latent import LatentCacheLayer
from flash_dmattn_hf.cache.layer import DynamicMaskCacheLayer, OfferingLayer
from flash_dmattn_hf.cache.native import NativeCacheLayer
from flash_dmattn_hf.cache.owner import gates_by_index
from flash_dmattn_hf.gates.attach import attention_modules, num_decoder_layers, text_config_of
from flash_dmattn_hf.gates.eligibility import chunk_size_of, is_cross_attention, read_shape, uses_attention_interface
from flash_dmattn_hf.versions import can_mask_chunks

_CONSTANT = (LinearAttentionLayer, getattr(cache_utils, "DummyLayer", LinearAttentionLayer))
"""Layers of transformers' own that have a constant size and change in place. transformers 5.17 has no DummyLayer."""


def put_layers(
    model: PreTrainedModel, layers: list[Any], is_static: bool, slot_dtype: torch.dtype | None = None
) -> None:
    """Puts layers of slots into the places of those that transformers made for a model.

    layers: of a DynamicCache, changed in place. is_static: whether all must have a constant size. slot_dtype: of
    `SlotLayer`.
    Raises what `DynamicMaskCache` raises.
    """
    for index, gate in gates_by_index(model).items():
        if index < len(layers):
            layers[index] = _layer_for(gate, layers[index], is_static)
    if is_static:
        _make_static(model, layers)
    for layer in layers:
        if isinstance(layer, LatentCacheLayer) and slot_dtype is not None:
            raise ValueError(
                f"slot_dtype must be None where slots hold latents, got {slot_dtype}: "
                "DynamicMaskCache(model, static=True) has slots for keys and values"
            )
        if isinstance(layer, OfferingLayer):
            layer.slot_dtype = slot_dtype


def _layer_for(gate: Any, layer: Any, is_static: bool) -> Any:
    """Returns the empty layer that takes the place of one of transformers', or that layer if it is of another kind.

    It holds latents where all heads keep the same tokens and no step has to be captured. ValueError for a layer that
    drops keys and holds more than keys.
    """
    if type(layer) is LinearAttentionAndFullAttentionLayer:
        return HybridCacheLayer(gate, layer.number_of_states)
    if type(layer) in (DynamicLayer, DynamicSlidingWindowLayer):
        holds_latents = gate.is_latent and gate.num_importance_heads == 1 and not is_static
        return (LatentCacheLayer if holds_latents else DynamicMaskCacheLayer)(gate)
    if isinstance(layer, DynamicSlidingWindowLayer):
        raise ValueError(
            f"layer {gate.layer_idx} of model must have a cache of keys and values alone, got a "
            f"{type(layer).__name__}, which drops keys that still compete"
        )
    return layer


def _make_static(model: PreTrainedModel, layers: list[Any]) -> None:
    """Replaces in place those layers that would grow by such as do not.

    A cache may have more layers than the decoder. Nothing updates those, so they stay as they are.
    """
    if any(hasattr(module, "_setup_cache") for module in model.modules()):
        raise ValueError(
            f"a static cache must hold what every layer remembers, got {type(model).__name__}, whose recurrent layers "
            'replace tensors of their own in every forward: use cache_implementation="dynamic"'
        )
    # The cross-attention of an encoder's decoder has the layer_idx of the self-attention, which the cache is about.
    native = sorted(_native_modules(model), key=is_cross_attention, reverse=True)
    modules = {module.layer_idx: module for module in native}
    for index, layer in enumerate(layers[: num_decoder_layers(model)]):
        if isinstance(layer, OfferingLayer) or type(layer) in _CONSTANT:
            continue
        if index not in modules:
            raise ValueError(
                f"a static cache must hold what every layer remembers, got layer {index} of {type(model).__name__}, "
                'which has no attention whose keys it could hold: use cache_implementation="dynamic"'
            )
        layers[index] = _native_layer(modules[index])


def _native_modules(model: PreTrainedModel) -> list[nn.Module]:
    """Returns the attention modules of the text model that bring keys of their own; which have gates is not asked."""
    config = text_config_of(model)
    return [
        module
        for _, module, owner in attention_modules(model)
        if getattr(module, "config", owner) is config
        and uses_attention_interface(module)
        and getattr(module, "layer_idx", None) is not None
        and not getattr(module, "is_kv_shared_layer", False)
    ]


def _native_layer(module: nn.Module) -> NativeCacheLayer:
    if is_cross_attention(module):
        raise ValueError(
            f"a static cache holds keys of the text alone, got layer {module.layer_idx}, whose cross-attention has the "
            'keys of an encoder or an image: use cache_implementation="dynamic"'
        )
    shape, chunk_size = read_shape(module), chunk_size_of(module)
    reach = shape.sliding_window or chunk_size
    if reach is None or shape.is_latent:
        why = "keys grow with the text" if reach is None else "latents are expanded outside the cache"
        raise ValueError(
            f"a static cache needs an importance gate, a sliding window or chunks in every attention layer, got layer "
            f'{module.layer_idx}, whose {why}: use cache_implementation="dynamic"'
        )
    if chunk_size is not None and not can_mask_chunks():
        raise ValueError(
            f"a static cache of chunked layers needs a transformers whose generate() can make their masks, got "
            f'{transformers.__version__}, which raises a TypeError there: use cache_implementation="dynamic"'
        )
    return NativeCacheLayer(module.layer_idx, reach, is_chunked=chunk_size is not None)
