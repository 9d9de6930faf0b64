"""The static cache of a layer that keeps its native sliding window or chunks: as many slots as it sees tokens.

A captured step needs tensors of fixed shapes at fixed addresses, and no decision of the host. transformers'
StaticSlidingWindowLayer decides on the host whether its window is full. A layer of slots whose local window is the
native one keeps the same keys, and its step is the step of every other layer.
"""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, cache_utils
from transformers.cache_utils import LinearAttentionLayer

from flash_dmattn import NEVER, Visibility
from flash_dmattn_hf.cache.eviction import end_of_window
from flash_dmattn_hf.cache.offering import OfferingLayer
from flash_dmattn_hf.config import Windows
from flash_dmattn_hf.gates.attach import attention_modules, text_config_of
from flash_dmattn_hf.gates.eligibility import chunk_size_of, read_shape, uses_attention_interface

_CONSTANT = (LinearAttentionLayer, getattr(cache_utils, "DummyLayer", LinearAttentionLayer))
"""Layers of transformers' own that have a constant size and change in place; up to 5.17 it has no DummyLayer."""


class NativeCacheLayer(OfferingLayer):
    """The cache of an attention layer without a gate, whose keys all weigh the same.

    layer_idx: of the attention module. reach: tokens of its sliding window or of its chunks.
    is_chunked: whether a token sees its chunk, which begins at a multiple of `reach`, instead of the last tokens.
    """

    def __init__(self, layer_idx: int, reach: int, is_chunked: bool):
        super().__init__(Windows(reach, 0, reach, None))
        self.layer_idx, self.is_chunked = layer_idx, is_chunked

    def _num_heads(self, key_states: torch.Tensor) -> int:
        return key_states.shape[1]

    def _importance_of(self, value: torch.Tensor) -> torch.Tensor:
        return torch.zeros(value.shape[:3], dtype=self.importance.dtype, device=value.device)

    def _visibility(self, importance: torch.Tensor, positions: torch.Tensor) -> Visibility:
        reach = self.windows.keep_window_size
        start = self._start_of_chunk(positions) if self.is_chunked else positions
        return Visibility(torch.where(positions < 0, NEVER, positions), end_of_window(start, reach))

    def _start_of_chunk(self, positions: torch.Tensor) -> torch.Tensor:
        return positions - positions % self.windows.keep_window_size

    def step(self, query: torch.Tensor, padding_mask: torch.Tensor | None = None, **options):
        """As for every layer; the first token of a chunk finds the slots empty."""
        if self.is_chunked:
            self._leave_chunks()
        return super().step(query, padding_mask, **options)

    def _settle(self) -> None:
        super()._settle()
        if self.is_chunked:
            self._leave_chunks()

    def _leave_chunks(self) -> None:
        """Forgets the keys of chunks that the next token does not belong to; their slots can then be taken."""
        start = self._start_of_chunk(self.lengths).unsqueeze(-1)
        self.positions.masked_fill_(self.positions < start, -1)


def make_static(model: PreTrainedModel, layers: list[Any]) -> None:
    """Replaces those layers of a DynamicMaskCache of this model that would grow by such as do not.

    Raises ValueError when a layer has no such replacement.
    """
    if any(hasattr(module, "_setup_cache") for module in model.modules()):
        raise ValueError(
            f"a static cache must hold what every layer remembers, got {type(model).__name__}, whose recurrent layers "
            'replace tensors of their own in every forward: use cache_implementation="dynamic"'
        )
    modules = {module.layer_idx: module for module in _native_modules(model)}
    for index, layer in enumerate(layers):
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
    shape, chunk_size = read_shape(module), chunk_size_of(module)
    reach = shape.sliding_window or chunk_size
    if reach is None or shape.is_latent:
        why = "keys grow with the text" if reach is None else "latents are expanded outside the cache"
        raise ValueError(
            f"a static cache needs an importance gate, a sliding window or chunks in every attention layer, got layer "
            f"{module.layer_idx}, whose {why}: use cache_implementation=\"dynamic\""
        )
    return NativeCacheLayer(module.layer_idx, reach, is_chunked=chunk_size is not None)
