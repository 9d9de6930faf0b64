"""One layer of the constant-size, lossless key/value cache.

A key that leaves the top K of its head never comes back, so it can be forgotten: `keep_window_size` slots per head,
allocated once, hold all that later tokens can see. Each key in them carries its importance and its true position: both
decide what later queries see, and neither can be recomputed once the heads have kept different tokens.
"""

import weakref
from typing import NamedTuple

import torch

from flash_dmattn import Visibility, select_visible
from flash_dmattn.ranking import cache_capacity, comparable, select_survivors
from flash_dmattn.slots import decode_step, refresh_victims
from flash_dmattn_hf.cache.handover import hand_over
from flash_dmattn_hf.cache.slots import SlotLayer
from flash_dmattn_hf.cache.tail import ROWS, Tail
from flash_dmattn_hf.gates.importance import importance_of


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


class DynamicMaskCacheLayer(SlotLayer):
    """The cache of one attention layer with an importance gate.

    One forward is `update` (from the model), then, from the attention function, `step` for a single token, else `view`
    and `evict`. Several tokens wait in a tail behind the slots until `evict` puts those that survive into them; while
    the past is recorded all wait there until the next `crop`, which undoes tokens by dropping them.

    Hc, the number of heads of the slots, is that of kv heads, or of query heads when importance is per query head. Of
    latent attention (MLA) `update` gets latents, and `receive` the keys and values that the layer makes of them.

    is_counted_outside: True while a captured or compiled forward of one token leaves counting it to `count_step`.
    record_past: while True nothing is evicted before the next `crop`, which can then undo every token since.
    """

    def __init__(self, gate):
        super().__init__(gate.windows)
        self._gate = weakref.ref(gate)
        self.record_past = self.is_counted_outside = False

    @property
    def gate(self):
        """The gate of the attention module that this layer belongs to. RuntimeError when its model is gone."""
        gate = self._gate()
        if gate is None:
            raise RuntimeError("the model of this DynamicMaskCache no longer exists; build a new cache for the new one")
        return gate

    @property
    def num_heads(self) -> int:
        """Hc, the heads of the slots."""
        return max(self.gate.num_kv_heads, self.gate.num_importance_heads)

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        head_dims = key_states.shape[3], value_states.shape[3]
        self._allocate(len(value_states), self.num_heads, head_dims, value_states.dtype, value_states.device)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Takes T tokens and offers them to the attention function.

        key_states: (B, Hkv, T, D), value_states: (B, Hkv, T, Dv), or what latent attention caches. Returns them as they
        are: what the tokens see is decided when they attend. Raises ValueError for another batch size than before or
        when the gate's windows have changed since the first token, RuntimeError when the tokens before these were never
        attended to by flash_dmattn.
        """
        self._check_windows()
        if not self.gate.is_latent:
            self.receive(key_states, value_states)
        self._num_new = key_states.shape[2]
        hand_over.offer(self, key_states, value_states)
        return key_states, value_states

    def _check_windows(self) -> None:
        gate = self.gate
        self.check_attended()
        if gate.windows != self.windows:
            self._change_windows(gate)

    def receive(self, key: torch.Tensor, value: torch.Tensor) -> None:
        """Takes the keys (B, Hkv, T, D) and values (B, Hkv, T, Dv) of the new tokens, and computes their importance."""
        if not self.is_counted_outside:
            self._make_room(key, value)
        importance = importance_of(self.gate, value)
        if importance.shape[1] == 1:
            importance = importance.expand(-1, self.num_heads, -1)
        self._new = (key.to(self.dtype), value, importance)

    def _change_windows(self, gate) -> None:
        if self.num_rows:
            raise ValueError(
                f"the windows of layer {gate.layer_idx} must be {self.windows}, as when this DynamicMaskCache took its "
                f"first token, got {gate.windows}; make a new DynamicMaskCache(model)"
            )
        self._release()
        self.windows = gate.windows

    def _make_room(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Makes slots for the first tokens, and has those of later tokens on their device."""
        batch = value_states.shape[0]
        fresh = (batch, value_states.dtype, value_states.device)
        if not self.is_initialized or (
            self.num_rows == 0 and fresh != (self.keys.shape[0], self.keys.dtype, self.keys.device)
        ):
            self.lazy_initialization(key_states, value_states)
        if batch != self.keys.shape[0]:
            raise ValueError(f"key_states must have the cache's batch size {self.keys.shape[0]}, got {batch}")
        self.to(key_states.device)

    def check_attended(self) -> None:
        """Raises RuntimeError when the attention function never saw the last tokens of `update`."""
        if self._num_new:
            hand_over.withdraw()
            raise RuntimeError(
                f"the last {self._num_new} tokens of this DynamicMaskCache were never attended to by flash_dmattn: the "
                "model is not the one the cache was made for, or runs another attention implementation, or its forward "
                "was interrupted; call cache.reset() or make a new DynamicMaskCache(model)"
            )

    @property
    def takes_step(self) -> bool:
        """Whether the new tokens can go into the slots at once: one token, nothing recorded, no gradient wanted."""
        if self._num_new != 1 or self._tail.rows or self.record_past:
            return False
        wants_grad = torch.is_grad_enabled() and any(states.requires_grad for states in self._new)
        return not (wants_grad or self.keys.requires_grad)

    def step(self, query: torch.Tensor, padding_mask: torch.Tensor | None = None, **options):
        """Appends the new token, evicts and attends, in place.

        query: (B, 1, H, D). padding_mask: (B, 1) bool, True for real tokens, or None. options: of `decode_step`.
        Returns out (B, 1, H, D), and lse (B, H, 1) if `return_lse` is among the options.
        """
        padding_mask = self._checked(padding_mask)
        key, value, importance = self._new
        num_slots, num_sinks, local_window, sliding_window = self.windows
        out = decode_step(
            query.to(self.dtype),
            key.transpose(1, 2),
            value.transpose(1, 2),
            importance,
            self.slots,
            num_sink_tokens=num_sinks,
            local_window_size=local_window,
            sliding_window=sliding_window,
            padding_mask=padding_mask,
            **options,
        )
        if not self.is_counted_outside:
            self._count_rows(padding_mask)
            self._num_undoable = self._num_undoable + 1 if self.num_rows <= num_slots else 0
        self._new, self._num_new = None, 0
        return out

    def count_step(self) -> None:
        """Counts one token of every batch row, which can then not be undone."""
        self.num_rows += 1
        self._num_undoable = 0

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
        visibility = select_visible(importance, positions=positions, **self.windows._asdict())
        return CacheView(key, value, importance, visibility, query_positions)

    def _checked(self, padding_mask: torch.Tensor | None) -> torch.Tensor | None:
        if padding_mask is None:
            return None
        expected = (self.keys.shape[0], self._num_new)
        if tuple(padding_mask.shape) != expected:
            raise ValueError(f"padding_mask must have shape {expected}, got {tuple(padding_mask.shape)}")
        return padding_mask.to(device=self.keys.device, dtype=torch.bool)

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

    def _count_rows(self, padding_mask: torch.Tensor | None) -> None:
        before, self.num_rows = self.num_rows, self.num_rows + self._num_new
        self._new = None
        if padding_mask is not None and before < self.windows.keep_window_size:
            rows = self.row_is_real[:, before : self.num_rows]
            rows.copy_(padding_mask[:, : rows.shape[1]])

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

    def activate_past_recording(self) -> None:
        """Keeps what is needed to undo, by `crop`, every token from now on."""
        self.record_past = True

    def stop_past_recording(self) -> None:
        """Goes back to a constant size at once."""
        self.record_past = False
        if self.is_initialized and not self._num_new:
            self._settle()

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the last `-tokens_to_remove` tokens (padding included) as if they had never been processed.

        tokens_to_remove: zero or negative, as in transformers; zero only returns the cache to its constant size.
        Raises ValueError for a positive number, and for more tokens than can be undone without loss.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"tokens_to_remove must be zero or minus the number of tokens, got {tokens_to_remove}")
        if not self.is_initialized:
            return
        self.check_attended()
        remove = -tokens_to_remove
        if remove > self._num_undoable:
            raise ValueError(
                f"tokens_to_remove must be at least {-self._num_undoable}, got {tokens_to_remove}: keys that older "
                "tokens saw are evicted; call cache.activate_past_recording() before the tokens to be removed"
            )
        if remove > 0:
            self._remove(remove)
        self._settle()

    def _remove(self, count: int) -> None:
        from_tail = min(count, len(self._tail))
        if from_tail:
            self.lengths.sub_(self._tail.drop_last(from_tail).unsqueeze(1))
        self._num_undoable -= count
        self.num_rows -= count
        if count > from_tail:  # these stand in slots, of which none was given up since
            rows = self.row_is_real[:, self.num_rows : self.num_rows + count - from_tail]
            self.lengths.sub_(rows.sum(-1, keepdim=True, dtype=torch.int32))
            self.positions.masked_fill_(self.positions >= self.lengths.unsqueeze(-1), -1)
            self._refresh_victims()
        self.row_is_real[:, self.num_rows :] = True


def _gather(states: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Picks rows (B, Hc, m) of states (B, Hc, n, ...)."""
    if states.dim() == 4:
        return states.gather(2, index.unsqueeze(-1).expand(*index.shape, states.shape[-1]))
    return states.gather(2, index)
