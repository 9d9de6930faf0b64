"""Recognises the mask functions of transformers, by what they are made of."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from transformers import masking_utils

_AND_CODE = masking_utils.and_masks(masking_utils.causal_mask_function).__code__
_OR_CODE = masking_utils.or_masks(masking_utils.causal_mask_function).__code__
_SLIDING_CODE = masking_utils.sliding_window_overlay(1).__code__
_CHUNKS_CODE = masking_utils.chunked_overlay(1, torch.empty(0)).__code__
_BLOCKS_CODE = masking_utils.blockwise_overlay(torch.empty(0)).__code__


class MaskLimits(NamedTuple):
    """How far a causal mask lets a query see: the tokens of a sliding window, of a chunk; None: no such limit."""

    sliding_window: int | None = None
    chunk_size: int | None = None


def meaning_of_mask(
    mask_function: Callable, local_size: int | None, use_vmap: bool
) -> tuple[MaskLimits, torch.Tensor | None]:
    """Returns the limits of a mask that slides, is chunked, or comes to a causal one. ValueError for every other.

    Such a mask may be wider by blocks of tokens that see each other, such as images. Then their numbers are returned as
    well, (B, N) integers, negative outside of blocks; else None. That a sliding window holds a block is taken for
    granted: it does not matter then which of them limits the other.

    local_size, use_vmap: the window according to the caller, and whether a part of the mask is a caller's own. Only
    while compiling they are believed, because what a function holds cannot be read then.
    """
    compiling = torch.compiler.is_compiling()
    if compiling and local_size is not None and not use_vmap and _code_of(mask_function) is _AND_CODE:
        return MaskLimits(local_size), None
    parts = [mask_function] if compiling else list(_conjuncts(mask_function))
    blocks = [part.numbers for part in parts if isinstance(part, _Widening)]
    parts = [part for part in parts if not isinstance(part, _Widening)]
    sliding = [part for part in parts if _code_of(part) is _SLIDING_CODE]
    chunked = [part for part in parts if _code_of(part) is _CHUNKS_CODE]
    limits = [*sliding, *chunked]
    others = [part for part in parts if part not in limits and part is not masking_utils.causal_mask_function]
    is_mixed = len(chunked) > 1 or (chunked and (sliding or blocks))
    # What stands beside a block must be the one causal function, or another one would hide what the block shows.
    is_hidden = blocks and (len(blocks) > 1 or len(parts) - len(limits) > 1)
    if others or len(limits) == len(parts) or is_mixed or is_hidden:
        # A compiler that reaches the error here, in no function below, leaves all of this to Python, if it may.
        name = type(mask_function).__name__ if compiling else _composition_of(mask_function)
        hint = "; blocks cannot be compiled with fullgraph=True" if compiling else ""
        raise ValueError(
            "flash_dmattn supports causal, sliding-window, chunked, padding and packed masks only, some with blocks "
            f"such as images or a prefix, got another one: {name}{hint}"
        )
    limits = MaskLimits(
        min((_held_by(part, "sliding_window") for part in sliding), default=None),
        _held_by(chunked[0], "chunk_size") if chunked else None,
    )
    return limits, blocks[0] if blocks else None


class _Widening(NamedTuple):
    """Pairs of tokens that a mask allows beyond its other parts: those of equal numbers from 0 on."""

    numbers: torch.Tensor


def _conjuncts(mask_function: Callable) -> Iterator[Callable | _Widening]:
    """Yields the functions that must all allow a pair, and what widens them, looking into transformers' compositions.

    A union with blocks is what it is without them if there are none.
    """
    code = _code_of(mask_function)
    if code is _AND_CODE:
        for part in _held_by(mask_function, "mask_functions"):
            yield from _conjuncts(part)
        return
    if code is _OR_CODE:
        union = _held_by(mask_function, "mask_functions")
        others = [part for part in union if _code_of(part) is not _BLOCKS_CODE]
        numbers = [_held_by(part, "block_sequence_ids") for part in union if part not in others]
        if len(others) == 1:
            wider = [_Widening(of_block) for of_block in numbers if bool((of_block >= 0).any())]
            inner = list(_conjuncts(others[0]))
            if not wider or masking_utils.causal_mask_function in inner:
                yield from (*inner, *wider)
                return
    yield mask_function


def _composition_of(mask_function: Callable) -> str:
    """Says what a mask function is made of: the names of its parts, and how they are combined."""
    code = _code_of(mask_function)
    if code is not _AND_CODE and code is not _OR_CODE:
        return _name_of(mask_function)
    parts = [_composition_of(part) for part in _held_by(mask_function, "mask_functions")]
    return f"({(' and ' if code is _AND_CODE else ' or ').join(parts)})"


def _name_of(function: Callable) -> str:
    """Returns the name of a function, or of the one that makes it, if every such function is an `inner_mask`."""
    name = getattr(function, "__qualname__", type(function).__name__)
    return name.removesuffix(".<locals>.inner_mask").rpartition(".")[2]


def _code_of(function: Callable) -> Any:
    return getattr(function, "__code__", None)


def _held_by(function: Callable, name: str) -> Any:
    """Returns what a function of transformers holds of the call that made it."""
    return function.__closure__[function.__code__.co_freevars.index(name)].cell_contents
