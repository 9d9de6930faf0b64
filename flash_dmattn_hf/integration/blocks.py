"""Bidirectional blocks of a forward, images and prefixes: found with its mask, and handed on as its mask.

A mask (B, 1, N) int32 says of every token the row at which its block begins, its own outside of blocks, and the
complement (`~`) for padding. So nothing is lost when a model moves its mask to another device. No other mask has three
dimensions: a model that takes it for a mask yet to be made, as Gemma inside PaliGemma does, gets it back as it is.
"""

import torch
from torch import nn

from flash_dmattn import Blocks, find_blocks


def mark_blocks(
    numbers: torch.Tensor, padding_mask: torch.Tensor | None, num_cached: int, length: int
) -> tuple[torch.Tensor, int] | None:
    """Returns the mask of a forward, and the real tokens of its longest block; None if no new token is in a block.

    numbers: (B, N), tokens with the same number from 0 on see each other, N >= length. padding_mask: (B, length) bool,
    True for real tokens, None if all are. num_cached: the tokens that came before, of `length` altogether.

    Raises ValueError for a block that is not a run of tokens, and for one of which only a part comes in this forward.
    """
    _refuse_later_tokens(numbers, padding_mask, length)
    numbers = numbers[:, :length]
    start = find_blocks(numbers, padding_mask=padding_mask).start
    row = torch.arange(length, dtype=torch.int32, device=start.device)
    is_real = torch.ones_like(start, dtype=torch.bool) if padding_mask is None else padding_mask
    if num_cached:
        if bool(((start[:, num_cached:] < num_cached) & is_real[:, num_cached:]).any()):
            raise ValueError(_part("of which the first tokens are cached"))
        numbers = torch.where(row < num_cached, -1, numbers)
    _refuse_gaps(numbers, is_real & (start == row))
    start, size = find_blocks(numbers, padding_mask=padding_mask)
    return None if size == 1 else (torch.where(is_real, start, ~start)[:, None], size)


def read_blocks(mask: torch.Tensor, size: int | None) -> tuple[torch.Tensor, Blocks]:
    """Returns which tokens of such a mask are real, (B, N) bool, and their blocks; size: of the longest, if known."""
    mask = mask[:, 0]
    is_real = mask >= 0
    start = torch.where(is_real, mask, ~mask)
    if size is None:
        size = find_blocks(start, padding_mask=is_real).size
    return is_real, Blocks(start, size)


def last_blocks(blocks: Blocks, count: int) -> Blocks:
    """Returns the blocks of the last `count` tokens, whose rows are counted from the first of these."""
    length = blocks.start.shape[1]
    if count == length:
        return blocks
    return blocks._replace(start=(blocks.start[:, length - count :] - (length - count)).clamp(min=0))


def refuse_unknown_prefix(module: nn.Module, query: torch.Tensor, attention_mask: torch.Tensor | None) -> None:
    """The first tokens of a text are bidirectional or causal, as their mask says; without blocks nobody says it."""
    num_tokens = query.shape[2]
    if num_tokens > 1 and (attention_mask is None or attention_mask.shape[1] == num_tokens):
        raise ValueError(
            f"{type(module).__name__} calls itself bidirectional (use_bidirectional_attention), so the model must say "
            "which tokens are the prefix, as PaliGemma does with token_type_ids (0 there), got none: transformers' own "
            "implementations do not agree on it then"
        )


def _refuse_later_tokens(numbers: torch.Tensor, padding_mask: torch.Tensor | None, length: int) -> None:
    if numbers.shape[1] == length:
        return
    if padding_mask is None:
        last = numbers[:, length - 1]
    else:
        row = torch.arange(length, device=numbers.device)
        last = numbers.gather(1, torch.where(padding_mask, row, 0).amax(1, keepdim=True))[:, 0]
    if bool(((last >= 0) & (last == numbers[:, length])).any()):
        raise ValueError(_part("of which the last tokens come later"))


def _part(what: str) -> str:
    return (
        f"a bidirectional block, such as an image, must come in one forward, got one {what}: leave out "
        "prefill_chunk_size, or split the text where no block is"
    )


def _refuse_gaps(numbers: torch.Tensor, is_first: torch.Tensor) -> None:
    """is_first: (B, N) bool, real tokens with which a run of one number begins, or that stand for themselves."""
    row = torch.arange(numbers.shape[1], device=numbers.device)
    first = torch.where(is_first & (numbers >= 0), numbers, -1 - row).sort(-1).values
    if bool((first.diff() == 0).any()):
        raise ValueError(
            "the tokens of a bidirectional block must follow one another, got a block with other tokens in between: "
            "flash_dmattn cannot hide those from it"
        )
