"""The mask function: what transformers asks for instead of a T x T mask."""

import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import masking_utils
from transformers.utils.import_utils import is_tracing

from flash_dmattn_hf.arguments import parameter_names
from flash_dmattn_hf.cache.cache import DynamicMaskCache
from flash_dmattn_hf.cache.handover import hand_over
from flash_dmattn_hf.config import settings_in
from flash_dmattn_hf.integration.blocks import mark_blocks
from flash_dmattn_hf.integration.documents import has_documents, mark_documents
from flash_dmattn_hf.integration.mask_functions import MaskLimits, meaning_of_mask
from flash_dmattn_hf.integration.shards import SHARD, find_shard, refuse_dense
from flash_dmattn_hf.names import DENSE_ON_RANKS, NAMES
from flash_dmattn_hf.parallel.context import Shard, active

_TAG = "_flash_dmattn_tag"
_DOCUMENTS = "_flash_dmattn_documents"


def dynamic_mask_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable = masking_utils.causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    *,
    local_size: int | None = None,
    use_vmap: bool = False,
    **kwargs: Any,
) -> torch.Tensor | None:
    """Returns None for plain causal attention, or what the attention function must know about the tokens.

    attention_mask: (B, S) bool, True for real tokens; (B, S) int64 for the document number of every token of a
        packed batch (as `mark_documents` gives it); or None.

    Returns None; (B, kv_offset + kv_length) bool if there is padding, if the mask slides or is chunked, or if there are
    cached tokens, so that the attention function sees whether keys are missing; the document numbers as they came; or,
    where new tokens form bidirectional blocks, what `mark_blocks` says of them. A mask carries a tag (`tag_of`), by
    which the attention function checks that the layer sees as far as its mask does.
    For a bidirectional mask, which cross-attention alone accepts, (B or 1, 1, 1, kv_length) bool.

    Raises ValueError for any mask that is not causal, sliding, chunked, padding or packed, or such a one with blocks;
    for blocks of packed documents and on several ranks; and for a static cache.
    """
    if mask_function is masking_utils.bidirectional_mask_function:
        return _mask_of_others(attention_mask, kv_length, kwargs.get("device"))
    limits, numbers = MaskLimits(), None
    if mask_function is not masking_utils.causal_mask_function:
        limits, numbers = meaning_of_mask(mask_function, local_size, use_vmap)
    if isinstance(q_offset, torch.Tensor) or q_offset + q_length != kv_offset + kv_length:
        if isinstance(q_offset, torch.Tensor) or kv_offset + kv_length > q_offset + q_length:
            raise ValueError("flash_dmattn does not support a static cache: use the default cache of generate()")
        raise ValueError(
            f"attention_mask must cover {q_offset + q_length} tokens (cached and new), got {kv_offset + kv_length}"
        )
    if numbers is not None and attention_mask is not None and attention_mask.dtype != torch.bool:
        raise ValueError(
            "bidirectional blocks, such as images, are not supported in packed documents and inside context_parallel: "
            "pad the texts, and leave the context"
        )
    if active.slot.content is not None:
        return _tag_with_shard(attention_mask, limits)
    length = kv_offset + kv_length
    is_plain, is_full = limits == MaskLimits() and not q_offset, False
    if numbers is not None:
        marked = _mark_blocks(numbers, attention_mask, batch_size, q_offset, length)
        if marked is not None:
            is_full = attention_mask is None or bool(attention_mask.all())
            return _tag(marked[0], limits, is_full, block_size=marked[1])
    if attention_mask is None:
        if is_plain or (torch.compiler.is_compiling() and not kv_offset):
            return None
        all_real = torch.ones((batch_size, length), dtype=torch.bool, device=kwargs.get("device"))
        return _tag(all_real, limits, is_full=True)
    if attention_mask.dtype == torch.bool:
        _check_length(attention_mask, length)
        is_full = not is_tracing(attention_mask) and bool(attention_mask.all())
        if is_full and is_plain:
            return None
    return _tag(attention_mask, limits, is_full)


def is_marked(mask: Any) -> bool:
    """Whether a mask is one of `blocks.mark_blocks`."""
    return isinstance(mask, torch.Tensor) and mask.dim() == 3 and mask.dtype == torch.int32


def _mask_of_others(attention_mask: torch.Tensor | None, length: int, device: Any) -> torch.Tensor:
    """Which of an encoder's tokens all queries see."""
    if attention_mask is None:
        attention_mask = torch.ones((1, length), dtype=torch.bool, device=device)
    return attention_mask[:, None, None]


def _mark_blocks(
    numbers: torch.Tensor, attention_mask: torch.Tensor | None, batch: int, num_cached: int, length: int
) -> tuple[torch.Tensor, int] | None:
    if attention_mask is not None:
        _check_length(attention_mask, length)
    if numbers.shape[1] < length:
        raise ValueError(f"the numbers of blocks must cover {length} cached and new tokens, got {numbers.shape[1]}")
    return mark_blocks(numbers.expand(batch, -1), attention_mask, num_cached, length)


def _check_length(attention_mask: torch.Tensor, length: int) -> None:
    if attention_mask.shape[-1] != length:
        raise ValueError(
            f"attention_mask must have {length} columns (cached and new tokens), got {attention_mask.shape[-1]}"
        )


@dataclass(frozen=True)
class MaskTag:
    """What a mask says beyond its entries: how far a query sees, and whether all tokens are real.

    shard: the rows of the forward, where several ranks hold the sequence.
    block_size: tokens of the longest block, where the mask is one of `mark_blocks`.
    """

    limits: MaskLimits
    is_full: bool = False
    shard: Shard | None = None
    block_size: int | None = None


def tag_of(mask: torch.Tensor | None) -> MaskTag | None:
    """Returns the tag of a mask of `dynamic_mask_mask`, None if it has none or lost it on the way."""
    return getattr(mask, _TAG, None)


def _tag(mask: torch.Tensor, limits: MaskLimits, is_full: bool = False, **more: Any) -> torch.Tensor:
    if torch.compiler.is_compiling():
        return mask
    mask = mask.view(mask.shape)  # the caller's own tensor stays as it is
    setattr(mask, _TAG, MaskTag(limits, is_full, **more))
    return mask


@torch.compiler.disable
def _tag_with_shard(mask: torch.Tensor | None, limits: MaskLimits) -> torch.Tensor | None:
    """Returns the mask of `find_shard` with its tag; as it came where it is another, which is refused later."""
    shard = getattr(mask, SHARD, None)
    return mask if shard is None else _tag(mask, limits, shard=shard)


def wrap_preprocess_mask_arguments(original: Callable) -> Callable:
    """Finds packed documents for our implementation, with or without a mask or a cache, and hands their numbers on.

    transformers looks for them only when there is neither a mask nor a cache, which a model in eval mode makes by
    default, and takes every gap in the positions for a new document.
    """
    names = parameter_names(original)

    @functools.wraps(original)
    def preprocess(*args, **kwargs):
        given = {**dict(zip(names, args)), **kwargs}  # noqa: B905 - a call may leave parameters out
        # By their places: the fourth is `past_key_values` up to transformers 5.23, and `cache` from 5.24 on.
        config, inputs_embeds, attention_mask, cache, position_ids = [given.get(name) for name in names[:5]]
        if getattr(config, "_attn_implementation", None) not in (*NAMES, DENSE_ON_RANKS):
            if active.slot.content is not None:
                refuse_dense(config)
            return original(*args, **kwargs)
        hand_over.withdraw()  # a forward begins: what one that was interrupted left is of no use
        has_three_dims = isinstance(attention_mask, torch.Tensor) and attention_mask.dim() == 3
        if has_three_dims or tag_of(attention_mask) is not None:  # an outer model made it for an inner one
            return True, attention_mask, None, None, None, None, None
        if _is_static_step(inputs_embeds, attention_mask, cache):
            _check_columns(attention_mask, cache)
            _admit_padding(cache, attention_mask, 1)
            return True, _last_column(attention_mask, inputs_embeds.device), None, None, None, None, None
        result = original(**{**given, "position_ids": None})
        is_final, mask, _, q_length, kv_length, q_offset, kv_offset = result
        if is_final:
            return result
        if active.slot.content is not None:
            mask = find_shard(active.slot.content, position_ids, mask, inputs_embeds, q_offset)
            return is_final, mask, None, q_length, kv_length, q_offset, kv_offset
        mask = _admit_padding(cache, mask, q_length)
        _look_at_growth(config, cache, q_offset)
        packed = _documents(position_ids, mask, inputs_embeds.shape[0], cache, q_offset)
        _look_at_documents(cache, packed is not None, q_offset)
        return is_final, mask if packed is None else packed, None, q_length, kv_length, q_offset, kv_offset

    return preprocess


def _admit_padding(cache: Any, mask: torch.Tensor | None, q_length: int) -> torch.Tensor | None:
    """Has a cache of constant size check that a mask says the same of its tokens as before; returns None if it is full.

    Nothing can be read while a graph is made or captured, and what generate() prepares for that is one column.
    """
    if not isinstance(cache, DynamicMaskCache) or torch.compiler.is_compiling():
        return mask
    num_cached = cache.num_tokens
    if num_cached == 0 and any(layer.num_rows for layer in cache.mask_layers):
        raise ValueError(
            "the layer_idx of a model's layers must begin at 0 and the first layer must cache its tokens, got none: "
            "number its layers anew"
        )
    if mask is not None:
        is_whole = mask.shape[1] == num_cached + q_length  # any other length is refused later
        if not is_whole or (mask.is_cuda and torch.cuda.is_current_stream_capturing()):
            return mask
    return cache.padding.admit(None if mask is None else mask.bool(), num_cached)


def _look_at_documents(cache: Any, are_new: bool, num_cached: Any) -> None:
    """Notes in a cache of all keys that packed documents come into it; ValueError for tokens that follow them.

    They would see all documents, each of which has seen itself alone.
    """
    if cache is None or torch.compiler.is_compiling() or not isinstance(num_cached, int):
        return
    if num_cached and getattr(cache, _DOCUMENTS, False):
        raise ValueError(
            f"past_key_values must hold one document in each row, got the {num_cached} cached tokens of packed ones: "
            "pad the documents to go on from them"
        )
    if not num_cached:
        setattr(cache, _DOCUMENTS, are_new)


def _look_at_growth(config: Any, cache: Any, num_cached: Any) -> None:
    if cache is None or isinstance(cache, DynamicMaskCache) or torch.compiler.is_compiling():
        return
    if isinstance(num_cached, int) and num_cached:
        settings = settings_in(config)
        if settings is not None and num_cached > settings.keep_window_size:
            _warn_of_growth()


@functools.cache
def _warn_of_growth() -> None:
    """Warns once per process: who makes no cache, or a plain one, may not know that there is another."""
    warnings.warn(
        "this cache of a flash_dmattn model holds all keys and grows with every token: pass "
        "past_key_values=flash_dmattn_hf.DynamicMaskCache(model) to keep keep_window_size keys per head, without loss",
        stacklevel=2,
    )


def _is_static_step(inputs_embeds: torch.Tensor, attention_mask: Any, cache: Any) -> bool:
    """Whether one more token comes to a static cache, where only its own column of the mask is news.

    What the mask function is was checked with the tokens before.
    """
    if not (isinstance(cache, DynamicMaskCache) and cache.is_static and inputs_embeds.shape[1] == 1):
        return False
    is_plain = attention_mask is None or (isinstance(attention_mask, torch.Tensor) and attention_mask.dim() == 2)
    return is_plain and all(layer.is_initialized for layer in cache.mask_layers)


def _check_columns(attention_mask: torch.Tensor | None, cache: DynamicMaskCache) -> None:
    """Raises ValueError unless a mask is of all tokens, cached and new, or the one column that `_last_column` makes."""
    if attention_mask is not None and attention_mask.shape[1] != 1 and not torch.compiler.is_compiling():
        _check_length(attention_mask, cache.num_tokens + 1)


def _last_column(attention_mask: torch.Tensor | None, device: torch.device) -> torch.Tensor | None:
    return None if attention_mask is None else attention_mask[:, -1:].to(device=device, dtype=torch.bool)


def _documents(position_ids: Any, mask: torch.Tensor | None, batch: int, cache: Any, q_offset: Any) -> Any:
    """Returns the document numbers of a packed batch, as `mark_documents` gives them, None if nothing is packed.

    Where tokens are cached already, positions are just positions.
    """
    if not isinstance(position_ids, torch.Tensor) or position_ids.dim() != 2:
        return None
    if is_tracing(position_ids):
        return _documents_while_tracing(position_ids, mask, batch, cache)
    if isinstance(q_offset, torch.Tensor) or q_offset:
        return None
    if mask is not None and mask.shape[-1] != position_ids.shape[1]:
        return None  # the length of the mask is refused later
    if bool((position_ids.diff() > 0).all()):
        return None  # one document: the usual case, and a fraction of the work
    numbers = mark_documents(position_ids.expand(batch, -1), mask)
    return numbers if bool(has_documents(numbers)) else None


def _documents_while_tracing(position_ids: torch.Tensor, mask: torch.Tensor | None, batch: int, cache: Any) -> Any:
    """As `_documents`, without a look at the positions: always numbers if there may be documents.

    With a mask there is only a check: which tokens are real decides about shapes.
    """
    if cache is not None:
        return None
    if mask is None:
        return mark_documents(position_ids.expand(batch, -1))
    if torch.compiler.is_compiling() and not torch.compiler.is_exporting() and mask.shape[-1] == position_ids.shape[1]:
        packed = has_documents(mark_documents(position_ids.expand(batch, -1), mask))
        torch._assert_async(~packed, "packed position_ids with an attention_mask cannot be compiled: pass no mask")
    return None
