"""The static cache of a layer that keeps its native sliding window or chunks: as many slots as it sees tokens.

A captured step needs tensors of fixed shapes at fixed addresses, and no decision of the host. transformers'
StaticSlidingWindowLayer decides on the host whether its window is full. A layer of slots whose local window is the
native one keeps the same keys, and its step is the step of every other layer.
"""

import torch

from flash_dmattn import NEVER, Blocks, Visibility
from flash_dmattn_hf.cache.eviction import end_of_window
from flash_dmattn_hf.cache.layer import OfferingLayer
from flash_dmattn_hf.config import Windows


class NativeCacheLayer(OfferingLayer):
    """The cache of an attention layer without a gate, whose keys all weigh the same.

    layer_idx: of the attention module. reach: tokens of its sliding window or of its chunks.
    is_chunked: whether a token sees its chunk, which begins at a multiple of `reach`, instead of the last tokens.
    """

    def __init__(self, layer_idx: int, reach: int, is_chunked: bool):
        super().__init__(Windows(reach, 0, reach, None))
        self.layer_idx, self.is_chunked = layer_idx, is_chunked

    def _num_heads(self, key_states: torch.Tensor) -> int:
        return key_states.shape[1]

    def _importance_of(self, value: torch.Tensor) -> torch.Tensor:
        return torch.zeros(value.shape[:3], dtype=self.importance.dtype, device=value.device)

    def _visibility(self, importance: torch.Tensor, positions: torch.Tensor, blocks: Blocks | None) -> Visibility:
        start = self._start_of_chunk(positions) if self.is_chunked else positions
        birth, death = torch.where(positions < 0, NEVER, positions), end_of_window(start, self.windows.keep_window_size)
        return Visibility(birth if blocks is None else blocks.births(birth, death), death)

    def _start_of_chunk(self, positions: torch.Tensor) -> torch.Tensor:
        return positions - positions % self.windows.keep_window_size

    def go_on_from(self, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor) -> None:
        """Holds, empty so far, what it would hold after a text of which the last tokens, all that it needs, are given.

        key: (B, Hkv, r, D), value: (B, Hkv, r, Dv). mask: (B, N) bool of the whole text, True for real tokens.
        """
        self._make_room(key, value)
        self.num_rows = mask.shape[1] - key.shape[2]
        self.lengths += mask[:, : self.num_rows].sum(1, keepdim=True, dtype=torch.int32)
        self.receive(key, value)
        self._num_new = key.shape[2]
        self.view(mask[:, self.num_rows :])
        self.evict()

    def step(self, query: torch.Tensor, padding_mask: torch.Tensor | None = None, **options):
        """As for every layer; the first token of a chunk finds the slots empty."""
        if self.is_chunked:
            self._leave_chunks()
        return super().step(query, padding_mask, **options)

    def _settle(self) -> None:
        super()._settle()
        if self.is_chunked:
            self._leave_chunks()

    def _leave_chunks(self) -> None:
        """Forgets the keys of chunks that the next token does not belong to; their slots can then be taken."""
        start = self._start_of_chunk(self.lengths).unsqueeze(-1)
        self.positions.masked_fill_(self.positions < start, -1)
