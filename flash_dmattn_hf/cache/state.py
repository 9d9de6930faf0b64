"""The contents of a DynamicMaskCache as tensors and numbers, to be saved and continued from elsewhere."""

from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, LinearAttentionLayer

from flash_dmattn_hf.cache.layer import DynamicMaskCacheLayer, OfferingLayer
from flash_dmattn_hf.cache.native import NativeCacheLayer
from flash_dmattn_hf.cache.owner import check_token_dtype
from flash_dmattn_hf.cache.slots import STATE

_NUMBERS = ("num_rows", "cumulative_length")
"""What layers count, each those that it has."""


def state_of(cache: Any) -> dict[str, Any]:
    """Returns what `DynamicMaskCache.state_dict` does."""
    padding = None if cache.padding.mask is None else cache.padding.mask.clone()
    return {"layers": [_state_of_layer(layer) for layer in cache.layers], "padding": padding}


def load_state(cache: Any, state: dict[str, Any], model: PreTrainedModel) -> None:
    """Does what `DynamicMaskCache.load_state_dict` says. model: that of the cache."""
    if len(state["layers"]) != len(cache.layers):
        raise ValueError(f"state must have {len(cache.layers)} layers, got {len(state['layers'])}")
    pairs = list(zip(cache.layers, state["layers"], strict=True))
    for layer, saved in pairs:
        _check_state_of_layer(layer, saved)
    for dtype in {_token_dtype(saved) for saved in state["layers"] if saved["tensors"]}:
        check_token_dtype(model, dtype)
    cache.padding.mask = state.get("padding")
    for layer, saved in pairs:
        if _is_of_dynamic_window(layer, saved):
            _go_on_from_window(layer, saved, cache.padding.mask)
        else:
            _load_state_of_layer(layer, saved)


def _state_of_layer(layer: Any) -> dict[str, Any]:
    """Returns copies of a layer's tensors, its counts and, of a constant-size layer, its windows.

    Raises RuntimeError for tokens that were never attended to or can still be undone, TypeError for other layers.
    """
    state = {name: getattr(layer, name) for name in _NUMBERS if hasattr(layer, name)}
    if isinstance(layer, OfferingLayer) and not isinstance(layer, LinearAttentionLayer):
        layer.check_attended()
        if layer.record_past:
            raise RuntimeError("tokens that can still be undone cannot be saved: call stop_past_recording() first")
        names = STATE
        state["windows"] = _windows_of(layer)
        if layer.slot_dtype is not None:
            state["slot_dtype"] = _name(layer.slot_dtype)
            state["dtype"] = _name(layer.dtype) if layer.is_initialized else None
    elif type(layer) in (DynamicLayer, DynamicSlidingWindowLayer):
        names = ("keys", "values")
    else:
        raise TypeError(f"a cache with a {type(layer).__name__} cannot be saved: only keys and values can")
    tensors = {name: getattr(layer, name).detach().clone() for name in names} if layer.is_initialized else {}
    return {**state, "tensors": tensors}


def _check_state_of_layer(layer: Any, state: dict[str, Any]) -> None:
    """Raises ValueError for the state of another kind of layer, or one of other windows or slots."""
    if _is_of_dynamic_window(layer, state):
        return
    windows = _windows_of(layer) if isinstance(layer, OfferingLayer) else None
    if state.get("windows") != windows:
        raise ValueError(f"state must be of a layer with the windows {windows}, got {state.get('windows')}")
    expected = [name for name in _NUMBERS if hasattr(layer, name)]
    found = [name for name in _NUMBERS if name in state]
    if found != expected:
        name = type(layer).__name__
        raise ValueError(f"state must be of a {name}, which counts {expected}, got one that counts {found}")
    slot_dtype = _name(layer.slot_dtype) if isinstance(layer, OfferingLayer) else None
    if state.get("slot_dtype") != slot_dtype:
        raise ValueError(f"state must be of a cache with slot_dtype={slot_dtype}, got {state.get('slot_dtype')}")
    if isinstance(layer, DynamicMaskCacheLayer) and state["tensors"]:
        _check_slots(layer, state["tensors"]["values"])


def _check_slots(layer: DynamicMaskCacheLayer, values: torch.Tensor) -> None:
    """values: (B, Hc, w, Dv) of the state."""
    found = values.shape[1], values.shape[3]
    if found != layer.slot_shape:
        is_other_kind = layer.gate.is_latent and 1 in (found[0], layer.slot_shape[0])
        why = ": a cache of latents and one of keys and values do not fit each other" if is_other_kind else ""
        raise ValueError(
            f"state must be of a layer whose slots have (heads, head dim of the values) {layer.slot_shape}, got "
            f"{found}{why}"
        )


def _is_of_dynamic_window(layer: Any, state: dict[str, Any]) -> bool:
    """Whether a layer of a static cache gets the state of the sliding or chunked layer of a dynamic one."""
    return isinstance(layer, NativeCacheLayer) and "cumulative_length" in state


def _go_on_from_window(layer: NativeCacheLayer, state: dict[str, Any], padding: torch.Tensor | None) -> None:
    """padding: as `SeenPadding.mask`."""
    layer.reset()
    if not state["tensors"]:
        return
    keys, values = state["tensors"]["keys"], state["tensors"]["values"]
    mask = torch.ones(keys.shape[0], state["cumulative_length"], dtype=torch.bool, device=keys.device)
    if padding is not None:
        mask[:, : padding.shape[1]] = padding
    layer.go_on_from(keys, values, mask)


def _token_dtype(state: dict[str, Any]) -> torch.dtype:
    """Returns the dtype of the tokens of a layer that has some; slots may hold them rounded."""
    name = state.get("dtype")
    return state["tensors"]["values"].dtype if name is None else getattr(torch, name)


def _name(dtype: torch.dtype | None) -> str | None:
    return None if dtype is None else str(dtype).removeprefix("torch.")


def _windows_of(layer: OfferingLayer) -> dict[str, int]:
    """Returns what decides which keys a layer holds; its sliding window only hides them."""
    windows = layer.windows._asdict()
    del windows["sliding_window"]
    return windows


def _load_state_of_layer(layer: Any, state: dict[str, Any]) -> None:
    """Gives a layer of the same kind and windows copies of what `_state_of_layer` returned, on the device of those."""
    layer.reset()
    tensors = state["tensors"]
    if tensors:
        like = tensors["keys"], tensors["values"]
        if state.get("dtype") is not None:  # these are rounded
            like = [states.to(_token_dtype(state)) for states in like]
        layer.lazy_initialization(*like)
    for name, tensor in tensors.items():
        if isinstance(layer, OfferingLayer):
            getattr(layer, name).copy_(tensor)
        else:
            setattr(layer, name, tensor.clone())
    for name in _NUMBERS:
        if name in state:
            setattr(layer, name, state[name])
