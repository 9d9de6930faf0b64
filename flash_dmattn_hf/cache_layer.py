"""One layer of the constant-size, lossless key/value cache.

A key that leaves the top K of its head never comes back, so it can be forgotten. What is kept, at most
`keep_window_size` keys per head, carries its importance and its true position: both decide what later queries see,
and neither can be recomputed once the heads have kept different tokens.
"""

import weakref
from typing import NamedTuple

import torch
from transformers.cache_utils import DynamicLayer

from flash_dmattn import Visibility, select_visible
from flash_dmattn.decode import cache_capacity, decode_visibility, find_victim, select_survivors

STATE = ("keys", "values", "importance", "positions", "num_real")


class CacheView(NamedTuple):
    """What the tokens being processed attend to: survivors first, then the new tokens in order.

    key, value: (B, Hc, n, D).
    importance: (B, Hc, n) float32 or float64, as computed when the key was written.
    visibility: birth and death, int32 (B, Hc, n), as positions.
    query_positions: (B, T) int32, positions of the new tokens, -1 for padding.
    """

    key: torch.Tensor
    value: torch.Tensor
    importance: torch.Tensor
    visibility: Visibility
    query_positions: torch.Tensor


class DynamicMaskCacheLayer(DynamicLayer):
    """The cache of one attention layer with an importance gate.

    Hc is the number of kv heads, or of query heads when importance is per query head. One forward is
    `update` (from the model), then `view` and `evict` (from the attention function).

    keys, values: (B, Hc, n, D); importance: (B, Hc, n); positions: (B, Hc, n) int32, -1 for an empty slot.
    num_real: (B,) int32, real tokens seen. num_rows: tokens seen, padding included.
    record_past: while True nothing is evicted before the next `crop`, which can then undo every token since.
    """

    def __init__(self, gate):
        super().__init__()
        self._gate = weakref.ref(gate)
        self._windows = {
            "keep_window_size": gate.config.keep_window_size,
            "num_sink_tokens": gate.config.num_sink_tokens,
            "local_window_size": gate.config.local_window_size,
        }
        self._sliding_window = gate.sliding_window
        self.record_past = False
        self._forget()

    @property
    def gate(self):
        """The gate of the attention module that this layer belongs to. RuntimeError when its model is gone."""
        gate = self._gate()
        if gate is None:
            raise RuntimeError("the model of this DynamicMaskCache no longer exists; build a new cache for the new one")
        return gate

    @property
    def num_keys(self) -> int:
        """Slots per head, empty ones included."""
        return self.importance.shape[-1] if self.is_initialized else 0

    @property
    def nbytes(self) -> int:
        return sum(getattr(self, name).nbytes for name in STATE) if self.is_initialized else 0

    def _state(self) -> dict[str, torch.Tensor]:
        return {name: getattr(self, name) for name in STATE} if self.is_initialized else {}

    def _transform(self, function) -> None:
        for name, state in self._state().items():
            setattr(self, name, function(state))

    def _forget(self) -> None:
        self.keys = self.values = self.importance = self.positions = self.num_real = None
        self.is_initialized = False
        self.num_rows = 0
        self._num_new = 0
        self._num_undoable = 0

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        batch, num_kv_heads = key_states.shape[:2]
        num_heads = max(num_kv_heads, self.gate.num_importance_heads)
        precision = torch.float64 if value_states.dtype == torch.float64 else torch.float32
        self.keys = key_states.new_empty(batch, num_heads, 0, key_states.shape[-1])
        self.values = value_states.new_empty(batch, num_heads, 0, value_states.shape[-1])
        self.importance = value_states.new_empty(batch, num_heads, 0, dtype=precision)
        self.positions = torch.empty(batch, num_heads, 0, dtype=torch.int32, device=self.device)
        self.num_real = torch.zeros(batch, dtype=torch.int32, device=self.device)
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Appends T tokens and hands this layer to the attention function, by way of the gate.

        key_states, value_states: (B, Hkv, T, D). Returns the kept and the new keys and values, (B, Hc, n, D).
        Raises ValueError for another batch size than before, RuntimeError when the tokens before these were never
        attended to by flash_dmattn.
        """
        gate = self.gate
        self.check_attended()
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if key_states.shape[0] != self.keys.shape[0]:
            raise ValueError(
                f"key_states must have the cache's batch size {self.keys.shape[0]}, got {key_states.shape[0]}"
            )
        self.to(key_states.device)
        importance = gate(value_states)
        repeats = self.keys.shape[1] // key_states.shape[1]
        if repeats > 1:
            key_states = key_states.repeat_interleave(repeats, dim=1)
            value_states = value_states.repeat_interleave(repeats, dim=1)
        self.keys = torch.cat([self.keys, key_states], dim=2)
        self.values = torch.cat([self.values, value_states], dim=2)
        self.importance = torch.cat([self.importance, importance], dim=2)
        self._num_new = key_states.shape[2]
        self.num_rows += self._num_new
        gate.pending = (self, self.keys, self.values)
        return self.keys, self.values

    def check_attended(self) -> None:
        """Raises RuntimeError when the attention function never saw the last tokens of `update`."""
        if self._num_new:
            raise RuntimeError(
                f"the last {self._num_new} tokens of this DynamicMaskCache were never attended to by flash_dmattn: the "
                "model is not the one the cache was made for, or runs another attention implementation, or its forward "
                "was interrupted; call cache.reset() or make a new DynamicMaskCache(model)"
            )

    def view(self, padding_mask: torch.Tensor | None = None) -> CacheView:
        """Gives the new tokens their positions and says which keys each of them sees.

        padding_mask: (B, T) bool, True for real tokens, or None when all are real.
        Raises ValueError for another shape.
        """
        batch, num_heads = self.keys.shape[:2]
        query_positions = self._next_positions(padding_mask)
        new = query_positions.unsqueeze(1).expand(batch, num_heads, self._num_new)
        self.positions = torch.cat([self.positions, new], dim=2)
        if self._num_new == 1 and self.num_keys <= self._windows["keep_window_size"] + 1:
            visibility = decode_visibility(
                self.importance,
                self.positions,
                query_positions[:, 0],
                sliding_window=self._sliding_window,
                **self._windows,
            )
        else:
            visibility = select_visible(
                self.importance, positions=self.positions, sliding_window=self._sliding_window, **self._windows
            )
        return CacheView(self.keys, self.values, self.importance, visibility, query_positions)

    def _next_positions(self, padding_mask: torch.Tensor | None) -> torch.Tensor:
        expected = (self.keys.shape[0], self._num_new)
        if padding_mask is None:
            count = torch.arange(1, self._num_new + 1, device=self.num_real.device).expand(expected)
            real = None
        else:
            if tuple(padding_mask.shape) != expected:
                raise ValueError(f"padding_mask must have shape {expected}, got {tuple(padding_mask.shape)}")
            real = padding_mask.to(device=self.num_real.device, dtype=torch.bool)
            count = real.cumsum(dim=1)
        positions = (self.num_real.unsqueeze(1) + count - 1).to(torch.int32)
        self.num_real = (self.num_real + count[:, -1]).to(torch.int32)
        return positions if real is None else positions.masked_fill(~real, -1)

    def evict(self) -> None:
        """Ends the forward: drops every key that no later query can see and that no longer competes."""
        self._num_undoable += self._num_new
        self._num_new = 0
        if not self.record_past:
            self._drop()

    def _drop(self) -> None:
        windows = dict(self._windows)
        capacity = cache_capacity(windows["keep_window_size"], windows["local_window_size"])
        surplus = self.num_keys - capacity
        if surplus <= 0:
            return
        self._num_undoable = 0
        with torch.no_grad():
            if surplus == 1 and capacity > 0:
                windows.pop("keep_window_size")
                victim = find_victim(self.importance, self.positions, self.num_real, **windows)
                kept = torch.arange(capacity, device=victim.device).expand(*victim.shape, capacity)
                kept = torch.where(kept == victim.unsqueeze(-1), capacity, kept)
            else:
                kept = select_survivors(self.importance, self.positions, self.num_real, **windows)
        rows = kept.unsqueeze(-1)
        self.keys = self.keys.gather(2, rows.expand(*kept.shape, self.keys.shape[-1]))
        self.values = self.values.gather(2, rows.expand(*kept.shape, self.values.shape[-1]))
        self.importance = self.importance.gather(2, kept)
        self.positions = self.positions.gather(2, kept)

    def activate_past_recording(self) -> None:
        """Keeps what is needed to undo, by `crop`, every token from now on."""
        self.record_past = True

    def stop_past_recording(self) -> None:
        """Goes back to a constant size at once."""
        self.record_past = False
        if self.is_initialized and not self._num_new:
            self._drop()

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the last `-tokens_to_remove` tokens (padding included) as if they had never been processed.

        tokens_to_remove: zero or negative, as in transformers; zero only returns the cache to its constant size.
        Raises ValueError for a positive number, and for more tokens than can be undone without loss.
        """
        if tokens_to_remove > 0:
            raise ValueError(
                f"tokens_to_remove must be zero or minus the number of tokens, got {tokens_to_remove}"
            )
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
            removed = self.positions[:, 0, -remove:]
            self.num_real = self.num_real - (removed >= 0).sum(dim=-1, dtype=torch.int32)
            for name in ("keys", "values", "importance", "positions"):
                setattr(self, name, getattr(self, name)[:, :, :-remove])
            self.num_rows -= remove
            self._num_undoable -= remove
        self._drop()

    def get_seq_length(self) -> int:
        """Returns the number of tokens processed, padding included."""
        return self.num_rows

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.num_rows + query_length, 0

    def reset(self) -> None:
        self._forget()

    def to(self, device: torch.device | str) -> "DynamicMaskCacheLayer":
        """Moves the layer's tensors; later updates move them to where the model is."""
        if self.is_initialized and self.keys.device != torch.device(device):
            self._transform(lambda state: state.to(device))
            self.device = self.keys.device
        return self

    def offload(self) -> None:
        self._transform(lambda state: state.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        self._transform(lambda state: state.to(self.device, non_blocking=True))

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self._transform(lambda state: state.index_select(0, beam_idx.to(state.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._transform(lambda state: state.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._transform(lambda state: state[indices.to(state.device)])
