"""Keys and values that a layer takes from an earlier one (num_kv_shared_layers), with their importance and visibility.

The layer that makes them has the gate. What its attention function found is tied to the key tensor itself, which the
model hands on to the layers that share it, so nothing is kept beyond the forward or between threads.
"""

from typing import Any, NamedTuple

import torch
from torch import nn

from flash_dmattn_hf.cache.eviction import CacheView
from flash_dmattn_hf.names import is_ours
from flash_dmattn_hf.serving.live_requests import LiveRequests

_TIE = "_flash_dmattn_shared"


class SharedKeys(NamedTuple):
    """What the layers that share a key must know of it.

    gate: of the layer that made it, None if that keeps its own attention. importance: (B, Hi, S) of all keys, where no
    cache is used. view: survivors and new tokens of a cache, or its slots after a step. served: live requests and the
    layer that made the key.
    """

    gate: Any | None
    importance: torch.Tensor | None = None
    view: CacheView | None = None
    served: tuple[LiveRequests, int] | None = None


def share(key: torch.Tensor, shared: SharedKeys) -> None:
    """Ties what later layers need to a key tensor (B, Hkv, S, D), as the model hands it on."""
    setattr(key, _TIE, shared)


def shared_with(module: nn.Module, key: torch.Tensor) -> SharedKeys:
    """Returns what was tied to a key tensor. RuntimeError if it did not come here as it was."""
    shared = getattr(key, _TIE, None)
    if shared is None:
        raise RuntimeError(
            f"layer {module.layer_idx} must get the very key tensor that an earlier layer made, got another one: "
            "compiling a model with shared keys, or moving them between devices, is not supported"
        )
    return shared


def slices_before_sharing(cls: type) -> bool:
    """Whether a model class goes on with its last tokens alone where its layers begin to share keys (Gemma4)."""
    return hasattr(cls, "_maybe_slice_kv_shared_inputs")


def keep_all_tokens(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
    """Forward pre-hook of such a model: it would slice masks of T x T tokens, and ours have one row."""
    if is_ours(module.config._attn_implementation):
        return args, {**kwargs, "logits_to_keep": None}
    return None
