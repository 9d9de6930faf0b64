"""Part of a prompt in a forward: which tokens it is, the slots of its request while it attends, and back."""

from typing import NamedTuple

import torch

from flash_dmattn.calls import Slots
from flash_dmattn.float8 import as_bits
from flash_dmattn_hf.cache.eviction import EvictingLayer
from flash_dmattn_hf.config import Windows

SMALLEST = 64
"""Tokens of the smallest part of a prompt that padded forwards have."""


class RowTokens(NamedTuple):
    """What a forward brings one request: the row of its slots, how many tokens it had before and how many come now."""

    row: int
    num_before: int
    num_new: int


class Chunk(NamedTuple):
    """Several tokens of one request, the first of them at `start` among those of the forward."""

    start: int
    tokens: RowTokens

    padding_mask = None

    @property
    def places(self) -> slice:
        """Where its tokens are."""
        return slice(self.start, self.start + self.tokens.num_new)

    def borrow(self, slots: Slots, windows: Windows, dtype: torch.dtype) -> EvictingLayer:
        """Returns a layer over the slots of the request."""
        layer, own = EvictingLayer(windows), slice(self.tokens.row, self.tokens.row + 1)
        layer.borrow(Slots(*(state[own] for state in slots)), dtype, self.tokens.num_before)
        return layer

    def give_back(self, layer: EvictingLayer, slots: Slots) -> None:
        """Nothing: the layer has worked on the slots themselves."""


class PaddedChunk(NamedTuple):
    """The same at fixed addresses and of a fixed number of tokens, which a CUDA graph can be captured with.

    row: (1,) int64. places: (C,) int64, where the tokens are. padding_mask: (1, C) bool, True for real ones, which come
    first. How many tokens the request had before stands in its slots.
    """

    row: torch.Tensor
    places: torch.Tensor
    padding_mask: torch.Tensor

    def borrow(self, slots: Slots, windows: Windows, dtype: torch.dtype) -> EvictingLayer:
        """Returns a layer over a copy of the slots of the request, of which none counts as known to be empty."""
        layer = EvictingLayer(windows)
        own = Slots(*(as_bits(state)[self.row].view(state.dtype) for state in slots))
        layer.borrow(own, dtype, windows.keep_window_size)
        return layer

    def give_back(self, layer: EvictingLayer, slots: Slots) -> None:
        """Writes the copy to the slots of the request."""
        for state, own in zip(slots, layer.slots, strict=True):
            as_bits(state)[self.row] = as_bits(own)


class PaddedBatch:
    """Whose tokens a padded forward brings: one of each of some requests, then part of the prompt of one more.

    Its tensors keep their addresses. most_requests, most_tokens: of a forward.
    """

    def __init__(self, most_requests: int, most_tokens: int, device: torch.device):
        self.most_requests, self.most_tokens = most_requests, most_tokens
        self._rows = torch.full((most_requests,), -1, dtype=torch.int32, device=device)
        self._row = torch.zeros(1, dtype=torch.int64, device=device)
        self._order = torch.arange(most_tokens, device=device)
        self._places = self._order.clone()
        self._is_real = torch.zeros(1, most_tokens, dtype=torch.bool, device=device)

    def pad_singles(self, count: int) -> int:
        """Returns to how many single tokens so many are padded: a power of 2, or as many as there can be."""
        return min(1 << max(0, count - 1).bit_length(), self.most_requests)

    def most_new(self, num_singles: int) -> int:
        """Returns how many tokens of a prompt fit beside so many single tokens; not above 0 where none do."""
        return self.most_tokens - self.pad_singles(num_singles)

    def sizes_of(self, batch: list[RowTokens]) -> tuple[int, int] | None:
        """Returns to how many single tokens and to how many of a prompt a batch is padded.

        None for a batch that is no single tokens followed by several of one request, or that does not fit.
        """
        *singles, last = batch
        if last.num_new < 2 or any(tokens.num_new != 1 for tokens in singles):
            return None
        most = self.most_new(len(singles))
        if last.num_new > most:
            return None
        return self.pad_singles(len(singles)), min(most, max(SMALLEST, 1 << (last.num_new - 1).bit_length()))

    def all_sizes(self) -> list[tuple[int, int]]:
        """Returns what `sizes_of` can return, the largest first."""
        found, num_singles = set(), self.most_requests
        while num_singles:
            most = self.most_new(num_singles)
            size = SMALLEST
            while most > 1:
                found.add((num_singles, min(size, most)))
                if size >= most:
                    break
                size *= 2
            num_singles = 1 << (num_singles - 1).bit_length() >> 1
        return sorted(found, key=lambda sizes: (sum(sizes), sizes), reverse=True)

    def fill(self, batch: list[RowTokens], sizes: tuple[int, int]) -> tuple[torch.Tensor, PaddedChunk]:
        """Returns the rows of single tokens, (B,) int32, -1 for padding, and the chunk, of the sizes (B, C) asked for.

        batch: one for which `sizes_of` returns these sizes, or empty: then all is padding.
        """
        (num_singles, size), (*singles, last) = sizes, batch or [RowTokens(0, 0, 0)]
        rows = [tokens.row for tokens in singles] + [-1] * (num_singles - len(singles))
        self._rows[:num_singles] = torch.tensor(rows, dtype=torch.int32)
        self._row.fill_(last.row)
        torch.add(self._order, len(singles), out=self._places)
        torch.lt(self._order, last.num_new, out=self._is_real[0])
        return self._rows[:num_singles], PaddedChunk(self._row, self._places[:size], self._is_real[:, :size])
