"""What a layer of constant size does with several new tokens: it attends to them and its slots, and evicts.

It knows no model and no gate: keys, values and importances come from whoever computed them.
"""

from typing import Any, NamedTuple

import torch

from flash_dmattn import NEVER, Blocks, Visibility, interval_attention, select_visible
from flash_dmattn.blocks import check_size
from flash_dmattn.calls import Slots
from flash_dmattn.float8 import keys_and_values
from flash_dmattn.ranking import cache_capacity, comparable, select_survivors
from flash_dmattn.slots import refresh_victims
from flash_dmattn_hf.cache.slots import SlotLayer
from flash_dmattn_hf.cache.tail import ROWS, Tail, pick
from flash_dmattn_hf.config import Windows


class CacheView(NamedTuple):
    """What the tokens being processed attend to: survivors first, then the new tokens in order.

    key: (B, Hc, n, D). value: (B, Hc, n, Dv).
    importance: (B, Hc, n) float32 or float64, as computed when the key was written.
    visibility: birth and death, int32 (B, Hc, n), as rows.
    query_positions: (B, T) int32, rows of the new tokens, -1 for padding; None where all are real and rows in order.
    is_ordered: whether rows are numbers of keys, which stand in order, so that the new tokens have the last ones; else
        rows are positions.
    num_later: how many keys that come after it one of the new tokens sees at most, in a bidirectional block.
    """

    key: torch.Tensor
    value: torch.Tensor
    importance: torch.Tensor
    visibility: Visibility
    query_positions: torch.Tensor | None
    is_ordered: bool
    num_later: int = 0

    def attend(self, query: torch.Tensor, max_visible: int, **options: Any) -> Any:
        """Attends to these keys. Returns out (B, T, H, Dv), or out and lse.

        query: (B, T, H, D), of the last T of the new tokens. max_visible: keys of its past that one of them sees at
        most, its own included.
        options: of `interval_attention`.
        """
        seqlen_q, seqlen_k = query.shape[1], self.key.shape[2]
        return interval_attention(
            query.to(self.value.dtype),
            self.key.to(self.value.dtype).transpose(1, 2),
            self.value.transpose(1, 2),
            self.importance,
            self.visibility,
            query_start=seqlen_k - seqlen_q if self.is_ordered else None,
            query_positions=None if self.query_positions is None else self.query_positions[:, -seqlen_q:],
            max_visible=max_visible + self.num_later,
            deterministic=torch.are_deterministic_algorithms_enabled(),
            **options,
        )


def view_of_slots(slots: Slots, dtype: torch.dtype, windows: Windows, padding_mask: torch.Tensor | None) -> CacheView:
    """Returns what the tokens of the last step see.

    slots: after the step, of a layer with these windows. dtype: of the tokens.
    padding_mask: (B, 1) bool, True for real tokens, or None. The slots are shown as they are now: the next step changes
    them, when every layer that shares them has attended.
    """
    birth = torch.where(slots.positions < 0, NEVER, slots.positions)
    death = end_of_window(slots.positions, windows.sliding_window)
    now = slots.lengths[:, :1] - 1
    if padding_mask is not None:
        now = torch.where(padding_mask, now, -1)
    return CacheView(*keys_and_values(slots, dtype), slots.importance, Visibility(birth, death), now, is_ordered=False)


class EvictingLayer(SlotLayer):
    """Slots that take several tokens at once, and evict.

    One forward is `take`, then `step` for a single token, else `attend`, or `view` and `evict`. Several tokens wait in
    a tail behind the slots until `evict` puts those that survive into them; while the past is recorded all wait there.

    record_past: while True nothing is evicted.
    """

    record_past = False

    def view(self, padding_mask: torch.Tensor | None = None, blocks: Blocks | None = None) -> CacheView:
        """Gives the new tokens their positions and says which keys each of them sees.

        Keys that were evicted beat none that is left. So what is left is selected as if it were the whole sequence, in
        rows of its own: the fastest kernels want keys that are born at their own numbers.

        padding_mask: (B, T) bool, True for real tokens, or None when all are real.
        blocks: bidirectional blocks of the new tokens, start (B, T) by their places among these, or None.
        Raises ValueError for another shape, and for a block that does not fit into the windows.
        """
        padding_mask = self._checked(padding_mask)
        if blocks is not None:
            w, _, r, sliding_window = self.windows
            check_size(blocks.size, self.num_keys + self._num_new, w, r, sliding_window)
        num_kept, first_row = self.num_kept, self.num_keys
        key, value, importance = self._new
        self._tail.append(key, value, comparable(importance), self._next_positions(padding_mask))
        self._count_rows(padding_mask)
        key, value, importance, positions = self._tail.behind(self.slots, num_kept)
        query_rows = None
        if padding_mask is not None:
            rows = torch.arange(first_row, key.shape[2], dtype=torch.int32, device=key.device)
            query_rows = torch.where(padding_mask, rows, -1)
        if blocks is not None:
            blocks = _behind(blocks, first_row)
        visibility = self._visibility(importance, positions, blocks)
        num_later = 0 if blocks is None else blocks.size - 1
        return CacheView(key, value, importance, visibility, query_rows, is_ordered=True, num_later=num_later)

    def _visibility(self, importance: torch.Tensor, positions: torch.Tensor, blocks: Blocks | None) -> Visibility:
        """Says which rows see the keys of slots and tail.

        importance, positions: (B, Hc, n), positions in order, -1 for keys of nobody. blocks: by row.
        """
        selection = self.windows._replace(sliding_window=None)._asdict()  # which counts evicted tokens, too
        birth, death = select_visible(importance, padding_mask=positions[:, 0] >= 0, blocks=blocks, **selection)
        sliding_window = self.windows.sliding_window
        if sliding_window is not None:
            death = death.minimum(self._rows_from(end_of_window(positions, sliding_window), positions))
        return Visibility(birth, death)

    def _rows_from(self, bounds: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Returns the first rows of the tail whose positions are not below these bounds, as both stand in `view`.

        bounds, positions: (B, Hc, n) int32. What is returned, too; it is n where there is no such row.
        """
        num_kept = positions.shape[2] - len(self._tail)
        so_far = positions[:, 0, num_kept:].cummax(dim=-1).values  # padding between them has none
        rows = torch.searchsorted(so_far, bounds.flatten(1), out_int32=True)
        return rows.view(bounds.shape) + num_kept

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
            rows = {name: pick(states, kept) for name, states in rows.items()}
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


def _behind(blocks: Blocks, num_before: int) -> Blocks:
    """Returns the blocks of new tokens as those of all keys, of which `num_before`, born long ago, come first."""
    start = torch.nn.functional.pad(blocks.start + num_before, (num_before, 0), value=NEVER)
    return blocks._replace(start=start)
