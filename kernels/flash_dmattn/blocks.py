"""Bidirectional blocks: runs of tokens that see each other, such as the tokens of an image, or of a prefix.

A key of a block is born at the first row of its block instead of its own, and that is all: sinks, local window and
competition go by positions, as without blocks, so no key dies earlier or later. While a block fits into the local
window, none of its keys is old enough to compete before the block is over. So all of its rows see all of its keys, and
every key still has one interval of rows.
"""

from typing import NamedTuple

import torch

from flash_dmattn.arguments import check_cu_seqlens, check_cu_seqlens_values, check_like, check_tensor


class Blocks(NamedTuple):
    """Which tokens form bidirectional blocks, as `find_blocks` returns it.

    start: (B, Sk) int32, the row of the first token of each key's block, the key's own row outside of blocks. For a
        pruned set of keys positions instead, also (B, Hi, Sk). A number above the key's own counts as its own.
    size: the real tokens of the longest block, 1 if there is none.
    """

    start: torch.Tensor
    size: int

    def births(self, birth: torch.Tensor, death: torch.Tensor) -> torch.Tensor:
        """Returns the births (B, Hi, Sk) of keys in blocks, given birth and death of the causal selection."""
        start = self.start if self.start.dim() == 3 else self.start[:, None]
        return torch.where(birth < death, torch.minimum(birth, start), birth)


def find_blocks(
    numbers: torch.Tensor,
    *,
    padding_mask: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
) -> Blocks:
    """Finds the blocks of tokens, to be passed to `select_visible` or `dynamic_mask_attention` as often as one likes.

    Real tokens that follow one another in one sequence form a block if they have the same number, 0 or higher. Waits
    for the device, to read the size of the longest block.

    numbers: (B, Sk) integers, negative for tokens in no block.
    padding_mask: (B, Sk) bool, True for real tokens, or None when all are. Padding is in no block and interrupts none.
    cu_seqlens: (num_docs + 1,) int32, the document boundaries of a packed batch (B = 1), or None. No block crosses one.

    Raises ValueError for an argument of the wrong shape, type, device or value.
    """
    check_tensor("numbers", numbers)
    if numbers.dim() != 2 or numbers.is_floating_point() or numbers.dtype == torch.bool:
        raise ValueError(f"numbers must be integers of shape (B, Sk), got {numbers.dtype} {tuple(numbers.shape)}")
    batch, length = numbers.shape
    row = torch.arange(length, device=numbers.device).expand(batch, length)
    is_real = torch.ones_like(numbers, dtype=torch.bool)
    if padding_mask is not None:
        check_like("padding_mask", padding_mask, (batch, length), numbers.device)
        is_real = padding_mask
    last_real = torch.where(is_real, row, -1).cummax(-1).values
    before = torch.cat([last_real.new_full((batch, 1), -1), last_real], dim=-1)[:, :length]
    previous = before.clamp(min=0)
    continues = is_real & (before >= 0) & (numbers >= 0) & (numbers == numbers.gather(-1, previous))
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, batch, numbers.device)
        check_cu_seqlens_values(cu_seqlens, length)
        document = torch.searchsorted(cu_seqlens.long(), row.contiguous(), right=True)
        continues &= document == document.gather(-1, previous)
    start = torch.where(is_real & ~continues, row, -1).cummax(-1).values
    start = torch.where(is_real, start, row)
    position = is_real.cumsum(-1)
    length_so_far = torch.where(is_real, position - position.gather(-1, start) + 1, 1)
    return Blocks(start.int(), int(length_so_far.max()) if length_so_far.numel() else 1)


def check_blocks(
    blocks: Blocks,
    importance: torch.Tensor,
    *,
    keep_window_size: int,
    local_window_size: int,
    sliding_window: int | None,
    is_causal: bool,
) -> None:
    """Raises ValueError unless all keys of every block live until the block is over."""
    if not isinstance(blocks, Blocks):
        raise ValueError(f"blocks must be what find_blocks returns, got {type(blocks).__name__}")
    if not is_causal:
        raise ValueError("blocks must be None when is_causal=False")
    batch, _, seqlen_k = importance.shape
    shape = tuple(importance.shape) if blocks.start.dim() == 3 else (batch, seqlen_k)
    check_like("blocks.start", blocks.start, shape, importance.device)
    if blocks.start.dtype != torch.int32:
        raise ValueError(f"blocks.start must be int32, got {blocks.start.dtype}")
    check_size(blocks.size, seqlen_k, keep_window_size, local_window_size, sliding_window)


def check_size(
    size: int, num_keys: int, keep_window_size: int, local_window_size: int, sliding_window: int | None
) -> None:
    """Raises ValueError if some of the keys of a block of `size` tokens may die before the block is over.

    num_keys: how many keys there are; keep_window_size of them stay.
    """
    limits = {} if num_keys <= keep_window_size else {"local_window_size": local_window_size}
    if sliding_window is not None:
        limits["sliding_window"] = sliding_window
    for name, limit in limits.items():
        if size > max(limit, 1):
            raise ValueError(
                f"{name} must hold the longest bidirectional block, which has {size} tokens, got {limit}: its first "
                "keys would be evicted before its last queries"
            )
