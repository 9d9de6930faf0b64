"""The static cache of a layer that keeps its native sliding window or chunks: as many slots as it sees tokens.

A captured step needs tensors of fixed shapes at fixed addresses, and no decision of the host. transformers'
StaticSlidingWindowLayer decides on the host whether its window is full. A layer of slots whose local window is the
native one keeps the same keys, and its step is the step of every other layer. But positions count padding too, as
native windows and chunks do, which then hold fewer keys than there are slots; chunks begin at the first real token.
"""

import torch

from flash_dmattn import Blocks, Visibility
from flash_dmattn_hf.cache.eviction import end_of_window
from flash_dmattn_hf.cache.layer import OfferingLayer
from flash_dmattn_hf.config import Windows


class NativeCacheLayer(OfferingLayer):
    """The cache of an attention layer without a gate, whose keys all weigh the same.

    layer_idx: of the attention module. reach: tokens of its sliding window or of its chunks.
    is_chunked: whether a token sees its chunk, which begins at a multiple of `reach`, instead of the last tokens.
    """

    def __init__(self, layer_idx: int, reach: int, is_chunked: bool):
        super().__init__(Windows(reach, 0, reach, reach))
        self.layer_idx, self.is_chunked = layer_idx, is_chunked

    def _num_heads(self, key_states: torch.Tensor) -> int:
        return key_states.shape[1]

    def _importance_of(self, value: torch.Tensor) -> torch.Tensor:
        return torch.zeros(value.shape[:3], dtype=self.importance.dtype, device=value.device)

    def _visibility(self, importance: torch.Tensor, positions: torch.Tensor, blocks: Blocks | None) -> Visibility:
        start = self._start_of_chunk(positions) if self.is_chunked else positions
        death = self._rows_from(end_of_window(start, self.windows.keep_window_size), positions)
        birth = torch.arange(positions.shape[2], dtype=torch.int32, device=positions.device).expand_as(positions)
        death = death.where(positions >= 0, birth)
        return Visibility(birth if blocks is None else blocks.births(birth, death), death)

    def _start_of_chunk(self, positions: torch.Tensor) -> torch.Tensor:
        return positions - positions % self.windows.keep_window_size

    def go_on_from(self, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor) -> None:
        """Holds, empty so far, what it would hold after a text of which the last tokens, all that it needs, are given.

        key: (B, Hkv, r, D), value: (B, Hkv, r, Dv). mask: (B, N) bool of the whole text, True for real tokens.
        """
        self._make_room(key, value)
        self.num_rows = mask.shape[1] - key.shape[2]
        self.lengths += self._is_counted(mask[:, : self.num_rows]).sum(1, keepdim=True, dtype=torch.int32)
        self.receive(key, value)
        self._num_new = key.shape[2]
        self.view(mask[:, self.num_rows :])
        self.evict()

    def _is_counted(self, padding_mask: torch.Tensor) -> torch.Tensor:
        """Which of the next tokens have a position, (B, T) bool."""
        if not self.is_chunked:
            return torch.ones_like(padding_mask)
        return (self.lengths[:, :1] > 0) | (padding_mask.cumsum(1) > 0)

    def _next_positions(self, padding_mask: torch.Tensor | None) -> torch.Tensor:
        if padding_mask is None:
            return super()._next_positions(None)
        count = self._is_counted(padding_mask).cumsum(1, dtype=torch.int32)
        positions = self.lengths[:, :1] + count - 1
        self.lengths.add_(count[:, -1:])
        return positions.masked_fill(~padding_mask, -1)

    def _lengths_before(self, count: int) -> torch.Tensor:
        return (self.lengths - count).clamp(min=0)

    def step(self, query: torch.Tensor, padding_mask: torch.Tensor | None = None, **options):
        """As for every layer; the first token of a chunk finds the slots empty."""
        if self.is_chunked:
            self._leave_chunks()
        attended = super().step(query, padding_mask, **options)
        if padding_mask is not None:  # of which the step counts real tokens only
            is_padding = padding_mask.to(self.lengths.device) == 0
            self.lengths.add_(is_padding & (self.lengths > 0) if self.is_chunked else is_padding)
        return attended

    def _settle(self) -> None:
        super()._settle()
        if self.is_chunked:
            self._leave_chunks()

    def _leave_chunks(self) -> None:
        """Forgets the keys of chunks that the next token does not belong to; their slots can then be taken."""
        start = self._start_of_chunk(self.lengths).unsqueeze(-1)
        self.positions.masked_fill_(self.positions < start, -1)
