"""The cache layer of a model whose layers attend and keep a convolution or a recurrence at once (falcon_h1, zaya)."""

from collections.abc import Callable
from typing import Any

import torch
from transformers.cache_utils import LinearAttentionLayer

from flash_dmattn_hf.cache.foreign import linear_states, transform_states
from flash_dmattn_hf.cache.layer import DynamicMaskCacheLayer


class HybridCacheLayer(DynamicMaskCacheLayer, LinearAttentionLayer):
    """Slots for the keys of the layer beside transformers' own states, which have a constant size anyway.

    gate: of the attention module. number_of_states: how many convolutions and recurrences the layer has.
    """

    is_croppable = LinearAttentionLayer.is_croppable

    def __init__(self, gate: Any, number_of_states: int):
        DynamicMaskCacheLayer.__init__(self, gate)
        LinearAttentionLayer.__init__(self, number_of_states)

    def lazy_initialization(self, *tensors: torch.Tensor, **options: Any) -> None:
        """Makes slots for keys and values, or, when called by names as transformers does, states."""
        if tensors:
            DynamicMaskCacheLayer.lazy_initialization(self, *tensors)
        else:
            LinearAttentionLayer.lazy_initialization(self, **options)

    def _transform(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super()._transform(function)
        transform_states(self, function)

    @property
    def nbytes(self) -> int:
        return super().nbytes + sum(state.nbytes for state in linear_states(self))

    def reset(self) -> None:
        """Empties slots and states, which stay where they are."""
        DynamicMaskCacheLayer.reset(self)
        LinearAttentionLayer.reset(self)

    def crop(self, tokens_to_remove: int) -> None:
        """As for other layers; RuntimeError unless the past is recorded, because states cannot be undone."""
        if self.record_past:
            DynamicMaskCacheLayer.crop(self, tokens_to_remove)
        LinearAttentionLayer.crop(self, tokens_to_remove)

    def stop_past_recording(self) -> None:
        """Goes back to a constant size at once."""
        if self.record_past:
            LinearAttentionLayer.crop(self, 0)
        DynamicMaskCacheLayer.stop_past_recording(self)
