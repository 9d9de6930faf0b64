"""The hidden states that a layer's projections read, on their way to its gate: transformers passes them to nobody else.

Hooks on the attention module offer them while it runs, and whoever computes the importance takes them. Both happen in
one thread, and modules keep nothing.
"""

import inspect
from typing import Any

import torch
from torch import nn

from flash_dmattn_hf.names import GATE_NAME
from flash_dmattn_hf.thread_slot import ThreadSlot

ARGUMENT = "hidden_states"
"""The first argument of the forward of an attention module, which its projections read."""

_KEY = -1
"""Of the hooks, in every module: torch numbers them, and torch.compile would compile every layer for its numbers."""

_offer = ThreadSlot()  # content: a gate, and the hidden states (B, T, hidden size) of its module's forward


def takes_hidden_states(module: nn.Module) -> bool:
    """Whether the forward of an attention module gets hidden states where the hooks look for them."""
    parameters = list(inspect.signature(type(module).forward).parameters)
    return parameters[1:2] == [ARGUMENT]


def offer_hidden_states(module: nn.Module) -> None:
    """Makes an attention module with a gate offer its hidden states while it runs."""
    module.register_forward_pre_hook(_make_offer, with_kwargs=True)
    module.register_forward_hook(_drop_offer, always_call=True)
    for function, hooks, marks in _places(module):
        for key in [key for key, hook in hooks.items() if hook is function and key != _KEY]:
            hooks[_KEY], marks[_KEY] = hooks.pop(key), marks.pop(key)


def stop_offering(module: nn.Module) -> None:
    """Takes out what `offer_hidden_states` has put in, if anything."""
    for function, hooks, marks in _places(module):
        for key in [key for key, hook in hooks.items() if hook is function]:
            del hooks[key], marks[key]


def _places(module: nn.Module) -> tuple[tuple[Any, dict, dict], ...]:
    return (
        (_make_offer, module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs),
        (_drop_offer, module._forward_hooks, module._forward_hooks_always_called),
    )


def _make_offer(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    _offer.slot.content = (getattr(module, GATE_NAME), kwargs[ARGUMENT] if ARGUMENT in kwargs else args[0])


def _drop_offer(module: nn.Module, args: tuple, output: Any) -> None:
    _offer.slot.content = None


def take_hidden_states(gate: Any, value: torch.Tensor) -> torch.Tensor:
    """Returns the hidden states (B, S, hidden size) of the tokens with these values (B, Hkv, S, D); once per forward.

    Raises ValueError when there are hidden states of some of the tokens only, RuntimeError when there are none.
    """
    slot = _offer.slot
    offer, slot.content = slot.content, None
    if offer is None or offer[0] is not gate:
        raise RuntimeError(
            f"the hidden states of layer {gate.layer_idx} did not reach its importance gate: they are taken once, in "
            "the forward of its attention module, in the same thread, and by a DynamicMaskCache of this very model"
        )
    hidden_states = offer[1]
    if hidden_states.shape[1] != value.shape[2]:
        raise ValueError(
            f'importance_input="hidden" needs the hidden states of all {value.shape[2]} tokens of layer '
            f"{gate.layer_idx}, got those of the last {hidden_states.shape[1]}: only a DynamicMaskCache(model) keeps "
            "the importance of cached tokens"
        )
    return hidden_states.to(value.device)
