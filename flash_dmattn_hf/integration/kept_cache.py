"""The cache of a running generate(), for models that drop it once and process all tokens again.

Models with two rotary scales (Phi3 with longrope) do so where the second scale begins. They would go on with a cache of
their own, which grows.
"""

import functools
import inspect
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from flash_dmattn_hf.arguments import get_cache, name_of_cache
from flash_dmattn_hf.cache.cache import DynamicMaskCache
from flash_dmattn_hf.thread_slot import ThreadSlot

_generating = ThreadSlot()  # content: the model that generates, the name of its cache, and the cache


def keep_cache(model: nn.Module, model_kwargs: Mapping[str, Any]) -> None:
    """Keeps the cache of constant size among the arguments of a model until the generate() that runs has ended."""
    name = name_of_cache(model_kwargs)
    if not isinstance(model_kwargs[name], DynamicMaskCache):
        return
    _generating.slot.content = (model, name, model_kwargs[name])
    if _drops_caches(type(model)) and _bring_cache_back not in model._forward_pre_hooks.values():
        model.register_forward_pre_hook(_bring_cache_back, with_kwargs=True)


@functools.cache
def _drops_caches(cls: type) -> bool:
    """Whether a model class may leave its cache out of a forward of generate(), as its source says."""
    try:
        source = inspect.getsource(cls.prepare_inputs_for_generation)
    except (OSError, TypeError):
        return True
    return re.search(r"^\s+(past_key_values|cache) = None$", source, re.MULTILINE) is not None


def wrap_generate(original):
    """Forgets the cache that is kept when generate() ends; one generate() may run within another, as an assistant's."""

    @functools.wraps(original)
    def generate(self, *args, **kwargs):
        before, _generating.slot.content = _generating.slot.content, None
        try:
            return original(self, *args, **kwargs)
        finally:
            _generating.slot.content = before

    return generate


def _bring_cache_back(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
    """Forward pre-hook: a model that generates with a cache, and was called without one, starts anew with it."""
    if torch.compiler.is_compiling():  # only steps of one token with their cache are compiled
        return None
    kept = _generating.slot.content
    if kept is None or kept[0] is not module or not kwargs.get("use_cache") or get_cache(kwargs) is not None:
        return None
    _, name, cache = kept
    cache.reset()
    return args, {**kwargs, name: cache}
