"""Layers of transformers' own in a DynamicMaskCache: the tensors that they hold, and how those are moved."""

from collections.abc import Callable
from typing import Any

import torch
from transformers.cache_utils import LinearAttentionLayer


def linear_states(layer: LinearAttentionLayer) -> list[torch.Tensor]:
    """Returns the states of convolutions and recurrences that a layer of transformers holds now."""
    states = (*layer.conv_states.values(), *layer.recurrent_states.values())
    return [state for state in states if state is not None]


def transform_states(layer: LinearAttentionLayer, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Replaces every state; one whose shape and device stay the same keeps its address."""
    for states in (layer.conv_states, layer.recurrent_states):
        for index, state in states.items():
            if state is None:
                continue
            new = function(state)
            if (new.shape, new.device) != (state.shape, state.device):
                states[index] = new
            elif new is not state:
                state.copy_(new)


def tensors_of(layer: Any) -> list[torch.Tensor]:
    """Returns all tensors that a layer of any kind holds now."""
    if isinstance(layer, LinearAttentionLayer):
        return linear_states(layer)
    return [state for state in vars(layer).values() if isinstance(state, torch.Tensor)]


def move_layer(layer: Any, device: torch.device | str | int, non_blocking: bool) -> None:
    """Moves all tensors of a layer of any kind to a device, in place."""
    if isinstance(layer, LinearAttentionLayer):
        transform_states(layer, lambda state: state.to(device, non_blocking=non_blocking))
        return
    for name, state in vars(layer).items():
        if isinstance(state, torch.Tensor):
            setattr(layer, name, state.to(device, non_blocking=non_blocking))
