"""Models that do not tell their mask about position_ids cannot hold packed documents apart: they refuse them."""

import inspect
import re
from functools import cache
from typing import Any

import torch
from torch import nn

from flash_dmattn_hf.arguments import get_cache
from flash_dmattn_hf.cache.cache import DynamicMaskCache
from flash_dmattn_hf.integration.documents import has_documents, mark_documents
from flash_dmattn_hf.names import is_ours

_MASK_CALL = re.compile(r"create_(?:causal|sliding_window_causal)_mask\(\s*(.*?)\n\s*\)", re.DOTALL)
_MASK_ARGUMENTS = re.compile(r"mask_kwargs = \{(.*?)\}", re.DOTALL)


@cache
def hides_positions(cls: type) -> bool:
    """True if a model class creates its causal mask without position_ids, as its source says."""
    try:
        source = inspect.getsource(cls)
    except (OSError, TypeError):
        return False
    calls = [call for call in _MASK_CALL.findall(source) if "**mask_kwargs" not in call]
    return any("position_ids" not in call for call in calls + _MASK_ARGUMENTS.findall(source))


def refuse_packed_positions(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    """Forward pre-hook: raises ValueError if position_ids restart although nobody would notice."""
    position_ids, cache = kwargs.get("position_ids"), get_cache(kwargs)
    if torch.compiler.is_compiling() or not isinstance(position_ids, torch.Tensor) or position_ids.dim() != 2:
        return
    if _num_cached(cache) > 0 or not is_ours(module.config.get_text_config()._attn_implementation):
        return
    mask = kwargs.get("attention_mask")
    if isinstance(mask, dict):
        return  # masks that generate() has made, where nothing is packed
    if mask is not None:
        if mask.shape[-1] != position_ids.shape[1] or mask.dim() != 2:
            return
        mask, position_ids = mask.bool(), position_ids.expand(mask.shape[0], -1)
    if has_documents(mark_documents(position_ids, mask)):
        raise ValueError(
            f"position_ids must rise by 1 for {type(module).__name__}, which does not tell its attention where "
            "packed documents begin: pad them instead"
        )


def _num_cached(cache: Any) -> int:
    """Returns the tokens of a cache, 0 without one; nothing is read from a GPU for it."""
    if cache is None:
        return 0
    return cache.num_tokens if isinstance(cache, DynamicMaskCache) else cache.get_seq_length()
