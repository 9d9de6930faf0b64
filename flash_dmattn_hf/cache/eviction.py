"""What a layer of constant size does with several new tokens: it attends to them and its slots, and evicts.

It knows no model and no gate: keys, values and importances come from whoever computed them.
"""

from typing import Any, NamedTuple

import torch

from flash_dmattn import NEVER, Visibility, interval_attention, select_visible
from flash_dmattn.ranking import cache_capacity, comparable, select_survivors
from flash_dmattn.slots import refresh_victims
from flash_dmattn_hf.cache.slots import SlotLayer
from flash_dmattn_hf.cache.tail import ROWS, Tail


class CacheView(NamedTuple):
    """What the tokens being processed attend to: survivors first, then the new tokens in order.

    key: (B, Hc, n, D). value: (B, Hc, n, Dv).
    importance: (B, Hc, n) float32 or float64, as computed when the key was written.
    visibility: birth and death, int32 (B, Hc, n), as positions.
    query_positions: (B, T) int32, positions of the new tokens, -1 for padding.
    """

    key: torch.Tensor
    value: torch.Tensor
    importance: torch.Tensor
    visibility: Visibility
    query_positions: torch.Tensor

    def attend(self, query: torch.Tensor, max_visible: int, **options: Any) -> Any:
        """Attends to these keys. Returns out (B, T, H, Dv), or out and lse.

        query: (B, T, H, D), of the last T of the new tokens. max_visible: keys that one of them sees at most.
        options: of `interval_attention`.
        """
        return interval_attention(
            query.to(self.value.dtype),
            self.key.to(self.value.dtype).transpose(1, 2),
            self.value.transpose(1, 2),
            self.importance,
            self.visibility,
            query_positions=self.query_positions[:, -query.shape[1] :],
            max_visible=max_visible,
            deterministic=torch.are_deterministic_algorithms_enabled(),
            **options,
        )


class EvictingLayer(SlotLayer):
    """Slots that take several tokens at once, and evict.

    One forward is `take`, then `step` for a single token, else `attend`, or `view` and `evict`. Several tokens wait in
    a tail behind the slots until `evict` puts those that survive into them; while the past is recorded all wait there.

    record_past: while True nothing is evicted.
    """

    record_past = False

    def view(self, padding_mask: torch.Tensor | None = None) -> CacheView:
        """Gives the new tokens their positions and says which keys each of them sees.

        padding_mask: (B, T) bool, True for real tokens, or None when all are real.
        Raises ValueError for another shape.
        """
        padding_mask = self._checked(padding_mask)
        query_positions = self._next_positions(padding_mask)
        num_kept = self.num_kept
        key, value, importance = self._new
        self._tail.append(key, value, comparable(importance), query_positions)
        self._count_rows(padding_mask)
        key, value, importance, positions = self._tail.behind(self.slots, num_kept)
        return CacheView(key, value, importance, self._visibility(importance, positions), query_positions)

    def _visibility(self, importance: torch.Tensor, positions: torch.Tensor) -> Visibility:
        """Says who sees the keys of slots and tail, both (B, Hc, n); positions are -1 for those of nobody."""
        return select_visible(importance, positions=positions, **self.windows._asdict())

    def view_after_step(self, padding_mask: torch.Tensor | None = None) -> CacheView:
        """Returns what the token of the last step sees of the slots, as they are until the next step changes them.

        padding_mask: (B, 1) bool, True for real tokens, or None.
        """
        slots = self.slots
        birth = torch.where(slots.positions < 0, NEVER, slots.positions)
        now = slots.lengths[:, :1] - 1
        if padding_mask is not None:
            now = torch.where(padding_mask, now, -1)
        visibility = Visibility(birth, end_of_window(slots.positions, self.windows.sliding_window))
        return CacheView(slots.keys, slots.values, slots.importance, visibility, now)

    def _next_positions(self, padding_mask: torch.Tensor | None) -> torch.Tensor:
        batch = self.lengths.shape[0]
        if padding_mask is None:
            count = torch.arange(1, self._num_new + 1, dtype=torch.int32, device=self.lengths.device)
            count = count.expand(batch, -1)
        else:
            count = padding_mask.cumsum(dim=1, dtype=torch.int32)
        positions = self.lengths[:, :1] + count - 1
        self.lengths.add_(count[:, -1:])
        return positions if padding_mask is None else positions.masked_fill(~padding_mask, -1)

    def evict(self) -> None:
        """Ends the forward: drops every key that no later query can see and that no longer competes."""
        self._num_undoable += self._num_new
        self._num_new = 0
        if not self.record_past:
            self._settle()

    def _settle(self) -> None:
        """Puts what survives of the tail into the slots."""
        if not len(self._tail):
            return
        num_kept, (num_slots, num_sinks, local_window, _) = self.num_kept, self.windows
        if self.num_keys <= cache_capacity(num_slots, local_window):
            start, rows = num_kept, self._tail.rows
        else:
            self._num_undoable = 0
            start, rows = 0, dict(zip(ROWS, self._tail.behind(self.slots, num_kept), strict=True))
            kept = select_survivors(
                rows["importance"],
                rows["positions"],
                self.lengths[:, 0],
                keep_window_size=num_slots,
                num_sink_tokens=num_sinks,
                local_window_size=local_window,
            )
            rows = {name: _gather(states, kept) for name, states in rows.items()}
            self.positions.fill_(-1)
        for name, states in rows.items():
            self._write(name, start, states)
        self._tail = Tail()
        self._refresh_victims()

    def _refresh_victims(self) -> None:
        _, num_sinks, local_window, _ = self.windows
        refresh_victims(self.slots, num_sink_tokens=num_sinks, local_window_size=local_window)

    def attend(self, query: torch.Tensor, padding_mask: torch.Tensor | None = None, **options) -> torch.Tensor:
        """Attends to the slots and the new tokens, and evicts.

        query: (B, T, H, D). padding_mask: as in `view`. options: of `interval_attention`. Returns out (B, T, H, Dv).
        """
        out = self.view(padding_mask).attend(query, self.windows.keep_window_size, **options)
        self.evict()
        return out


def end_of_window(positions: torch.Tensor, window: int | None) -> torch.Tensor:
    """Returns the first positions that no longer see keys at these within a window of tokens, None for no window."""
    if window is None:
        return torch.full_like(positions, NEVER)
    return torch.where(positions > NEVER - window, NEVER, positions + window)


def _gather(states: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Picks rows (B, Hc, m) of states (B, Hc, n, ...)."""
    if states.dim() == 4:
        return states.gather(2, index.unsqueeze(-1).expand(*index.shape, states.shape[-1]))
    return states.gather(2, index)
