"""Where keys stand in their sequences, when they are not one whole sequence in order.

Selection asks an axis, of which `selection.py` has the plain one and this file the others, for

    importance                          (B, Hi, Sk), as it is compared
    position                            the place in the key's own sequence, integers
    is_real                             whether there is a key at all, bool
    segment                             the number of the sequence, below num_segments; None: all are of one, in order
    intervals(death)                    birth and death in the caller's terms, given the positions at which keys die
    intervals_of_whole_sequence(seen)   the same where a key is visible to its whole sequence or to nobody

position, is_real and segment broadcast to importance. What `intervals` returns may be above NEVER.
"""

import torch

from flash_dmattn.dispatch import SELECTION, find
from flash_dmattn.visibility import NEVER


class SegmentedAxis:
    """Keys with padding between them, or of several packed documents: positions count a document's real tokens."""

    def __init__(self, importance: torch.Tensor, padding_mask: torch.Tensor | None, cu_seqlens: torch.Tensor | None):
        batch, _, length = importance.shape
        device = importance.device
        self.importance = importance
        self.length = length
        self.row = torch.arange(length, device=device)
        self.is_packed = cu_seqlens is not None
        if padding_mask is None:
            padding_mask = torch.ones(batch, length, dtype=torch.bool, device=device)
        if self.is_packed:
            bounds = cu_seqlens.long()
            document = torch.searchsorted(bounds[1:].contiguous(), self.row, right=True)
            document = document.clamp(max=bounds.numel() - 2)
        else:
            bounds = torch.arange(2, device=device) * length  # no copy from the host, which a CUDA graph cannot have
            document = torch.zeros_like(self.row)
        self.num_segments = bounds.numel() - 1
        real_before = torch.nn.functional.pad(padding_mask.long().cumsum(-1), (1, 0))  # (B, Sk + 1)
        first_real = real_before[:, bounds[document]]  # (B, Sk), real tokens before the document
        self.is_real = padding_mask[:, None]
        self.segment = document.expand(batch, 1, length)
        self.position = (real_before[:, :-1] - first_real)[:, None]
        self.first_real = first_real[:, None]
        self.num_real = (real_before[:, bounds[document + 1]] - first_real)[:, None]
        self.document_start, self.document_end = bounds[document], bounds[document + 1]
        self.real_rows = padding_mask.byte().argsort(dim=-1, descending=True, stable=True)  # real rows first

    def intervals(self, death: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        death = death.expand(self.importance.shape)
        is_inside = death < self.num_real
        index = torch.where(is_inside, self.first_real + death, 0)
        row = self.real_rows[:, None].expand(death.shape).gather(-1, index)
        beyond = self.document_end if self.is_packed else self.length + death - self.num_real
        beyond = torch.where(death >= NEVER, self._never(), beyond)
        death = torch.where(is_inside, row, beyond)
        return self.row.expand(death.shape), torch.where(self.is_real, death, self.row)

    def intervals_of_whole_sequence(self, is_seen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        birth = torch.where(is_seen, self.document_start, self.row)
        return birth, torch.where(is_seen, self._never(), self.row)

    def _never(self) -> torch.Tensor:
        return self.document_end if self.is_packed else torch.full_like(self.row, NEVER)


class PrunedAxis:
    """A pruned set of keys in any order, with their true positions; sorted here, unsorted in the result."""

    num_segments = 1

    def __init__(self, importance: torch.Tensor, positions: torch.Tensor, padding_mask: torch.Tensor | None):
        positions = positions.long()
        if padding_mask is not None:
            positions = positions.masked_fill(~padding_mask[:, None], -1)
        order = torch.where(positions < 0, NEVER, positions).argsort(dim=-1, stable=True)
        self.order = order
        self.importance = importance.gather(-1, order)
        self.position = positions.gather(-1, order)
        self.is_real = self.position >= 0
        self.segment = torch.zeros_like(self.position)

    def intervals(self, death: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self._unsorted(self.position, torch.where(self.is_real, death, self.position))

    def intervals_of_whole_sequence(self, is_seen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self._unsorted(torch.where(is_seen, 0, self.position), torch.where(is_seen, NEVER, self.position))

    def evictions_by_backend(self, competes: torch.Tensor, num_contested: int) -> torch.Tensor | None:
        """Returns what `competition.eviction_positions` does, None where no backend selects.

        A backend takes every head as a batch row of competing keys and padding.
        """
        backend = find(SELECTION, self.importance.device, self.importance, None)
        if backend is None:
            return None
        _, death = backend.select_visible(
            self.importance.flatten(0, 1)[:, None],
            num_contested,
            num_sink_tokens=0,
            local_window_size=0,
            sliding_window=None,
            is_causal=True,
            padding_mask=competes.flatten(0, 1),
            cu_seqlens=None,
        )
        length, row = self.importance.shape[-1], death.view(self.importance.shape).long()
        return torch.where(row < length, self.position.gather(-1, row.clamp(max=length - 1)), NEVER)

    def _unsorted(self, birth: torch.Tensor, death: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return (
            torch.empty_like(birth).scatter_(-1, self.order, birth),
            torch.empty_like(death).scatter_(-1, self.order, death),
        )
