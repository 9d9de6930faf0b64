"""Recognises the mask functions of transformers, by what they are made of."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from transformers import masking_utils
from transformers.utils.import_utils import is_tracing

_AND_CODE = masking_utils.and_masks(masking_utils.causal_mask_function).__code__
_OR_CODE = masking_utils.or_masks(masking_utils.causal_mask_function).__code__
_SLIDING_CODE = masking_utils.sliding_window_overlay(1).__code__
_CHUNKS_CODE = masking_utils.chunked_overlay(1, torch.empty(0)).__code__
_BLOCKS_CODE = masking_utils.blockwise_overlay(torch.empty(0)).__code__


class MaskLimits(NamedTuple):
    """How far a causal mask lets a query see: the tokens of a sliding window, of a chunk; None: no such limit."""

    sliding_window: int | None = None
    chunk_size: int | None = None


def limits_of_mask(mask_function: Callable, local_size: int | None, use_vmap: bool) -> MaskLimits:
    """Returns the limits of a mask that slides, is chunked, or comes to a causal one. ValueError for every other.

    local_size, use_vmap: the window according to the caller, and whether a part of the mask is a caller's own. Only
    while compiling they are believed, because what a function holds cannot be read then.
    """
    compiling = torch.compiler.is_compiling()
    if compiling and local_size is not None and not use_vmap and _code_of(mask_function) is _AND_CODE:
        return MaskLimits(local_size)
    parts = [mask_function] if compiling else list(_conjuncts(mask_function))
    sliding = [part for part in parts if _code_of(part) is _SLIDING_CODE]
    chunked = [part for part in parts if _code_of(part) is _CHUNKS_CODE]
    limits = [*sliding, *chunked]
    others = [part for part in parts if part not in limits and part is not masking_utils.causal_mask_function]
    if others or len(limits) == len(parts) or len(chunked) > 1 or (sliding and chunked):
        raise ValueError(
            "flash_dmattn supports causal, sliding-window, chunked, padding and packed masks only, got another one "
            f"({getattr(mask_function, '__qualname__', type(mask_function).__name__)}), such as a prefix, image-block, "
            "bidirectional or custom mask"
        )
    return MaskLimits(
        min((_held_by(part, "sliding_window") for part in sliding), default=None),
        _held_by(chunked[0], "chunk_size") if chunked else None,
    )


def _conjuncts(mask_function: Callable) -> Iterator[Callable]:
    """Yields the functions that must all allow a pair, looking into transformers' own compositions.

    A union with blocks of tokens that see each other, such as images, is what it is without them if there are none.
    """
    parts = [mask_function]
    if _code_of(mask_function) is _AND_CODE:
        parts = _held_by(mask_function, "mask_functions")
    elif _code_of(mask_function) is _OR_CODE:
        union = [part for part in _held_by(mask_function, "mask_functions") if not _is_empty(part)]
        parts = union if len(union) == 1 else parts
    for part in parts:
        if part is mask_function:
            yield part
        else:
            yield from _conjuncts(part)


def _is_empty(mask_function: Callable) -> bool:
    """Whether a mask function allows nothing because it knows of no block: text without images."""
    if _code_of(mask_function) is not _BLOCKS_CODE:
        return False
    blocks = _held_by(mask_function, "block_sequence_ids")
    return not is_tracing(blocks) and not bool((blocks >= 0).any())


def _code_of(function: Callable) -> Any:
    return getattr(function, "__code__", None)


def _held_by(function: Callable, name: str) -> Any:
    """Returns what a function of transformers holds of the call that made it."""
    return function.__closure__[function.__code__.co_freevars.index(name)].cell_contents
