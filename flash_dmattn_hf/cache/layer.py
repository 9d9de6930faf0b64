"""One layer of the constant-size, lossless key/value cache, as a model's attention module uses it.

A key that leaves the top K of its head never comes back, so it can be forgotten: `keep_window_size` slots per head,
allocated once, hold all that later tokens can see. Each key in them carries its importance and its true position: both
decide what later queries see, and neither can be recomputed once the heads have kept different tokens.
"""

import weakref
from typing import Any

import torch

from flash_dmattn_hf.cache.eviction import EvictingLayer
from flash_dmattn_hf.cache.handover import hand_over
from flash_dmattn_hf.gates.importance import importance_of


def living(reference: weakref.ref) -> Any:
    """Returns what a cache refers to of its model. RuntimeError when the model is gone."""
    found = reference()
    if found is None:
        raise RuntimeError("the model of this DynamicMaskCache no longer exists; build a new cache for the new one")
    return found


class OfferingLayer(EvictingLayer):
    """The cache of one attention layer.

    One forward is `update` (from the model), then, from the attention function, `step` for a single token, else
    `attend`. While the past is recorded all tokens wait in the tail until the next `crop`, which undoes tokens by
    dropping them.

    gate: of the attention module, None if it has none. layer_idx: of the attention module.
    record_past: while True nothing is evicted before the next `crop`, which can then undo every token since.
    """

    gate: Any | None = None

    def _num_heads(self, key_states: torch.Tensor) -> int:
        """Returns Hc, the number of heads of the slots. key_states: (B, Hkv, T, D)."""
        raise NotImplementedError

    def _importance_of(self, value: torch.Tensor) -> torch.Tensor:
        """Returns the importance (B, Hc, T) of tokens with these values (B, Hkv, T, Dv)."""
        raise NotImplementedError

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        head_dims = key_states.shape[3], value_states.shape[3]
        num_heads = self._num_heads(key_states)
        self._allocate(len(value_states), num_heads, head_dims, value_states.dtype, value_states.device)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Takes T tokens and offers them to the attention function.

        key_states: (B, Hkv, T, D), value_states: (B, Hkv, T, Dv). Returns them as they are: what the tokens see is
        decided when they attend. Raises ValueError for another batch size or dtype than before, RuntimeError when the
        tokens before these were never attended to by flash_dmattn.
        """
        self.check_attended()
        self.receive(key_states, value_states)
        self._offer(key_states, value_states)
        return key_states, value_states

    def _offer(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self._num_new = key_states.shape[2]
        hand_over.offer(self, key_states, value_states)

    def receive(self, key: torch.Tensor, value: torch.Tensor) -> None:
        """Takes the keys (B, Hkv, T, D) and values (B, Hkv, T, Dv) of the new tokens, and computes their importance.

        Raises RuntimeError where they have a gradient and the slots round.
        """
        if self.slot_dtype is not None and (key.requires_grad or value.requires_grad):
            raise RuntimeError(f"slots of {self.slot_dtype} have no gradient: run the model under torch.no_grad()")
        if not self.is_counted_outside:
            self._make_room(key, value)
        self._new = (key.to(self.dtype), value, self._importance_of(value))

    def _make_room(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Makes slots for the first tokens, and has those of later tokens on their device."""
        batch = value_states.shape[0]
        fresh = (batch, value_states.dtype, value_states.device)
        if not self.is_initialized or (
            self.num_rows == 0 and fresh != (self.keys.shape[0], self.dtype, self.keys.device)
        ):
            self.lazy_initialization(key_states, value_states)
        if batch != self.keys.shape[0]:
            raise ValueError(f"key_states must have the cache's batch size {self.keys.shape[0]}, got {batch}")
        if value_states.dtype != self.dtype:
            raise ValueError(
                f"value_states must have the dtype of the tokens before, {self.dtype}, got {value_states.dtype}: the "
                "cache goes on from a state of another dtype, or the model or its autocast has changed"
            )
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
        lengths, from_tail = self._lengths_before(count), min(count, len(self._tail))
        if from_tail:
            self._tail.drop_last(from_tail)
        self.lengths.copy_(lengths)
        self._num_undoable -= count
        self.num_rows -= count
        if count > from_tail:  # these stand in slots, of which none was given up since
            self.positions.masked_fill_(self.positions >= lengths.unsqueeze(-1), -1)
            self._refresh_victims()
        self.row_is_real[:, self.num_rows :] = True

    def _lengths_before(self, count: int) -> torch.Tensor:
        """Returns the lengths, (B, Hc) or (B, 1), that there were before the last `count` tokens."""
        from_tail = min(count, len(self._tail))
        rows = self.row_is_real[:, self.num_rows - count : self.num_rows - from_tail]
        num_real = rows.sum(-1, dtype=torch.int32) + self._tail.num_real(from_tail)
        return self.lengths - num_real.unsqueeze(1)


class DynamicMaskCacheLayer(OfferingLayer):
    """The cache of one attention layer with an importance gate.

    Hc, the number of heads of the slots, is that of kv heads, or of query heads when importance is per query head. Of
    latent attention (MLA) `update` gets latents, and `receive` the keys and values that the layer makes of them.
    """

    def __init__(self, gate):
        super().__init__(gate.windows)
        self._gate, self._settings = weakref.ref(gate), gate.config

    @property
    def gate(self):
        """The gate of the attention module that this layer belongs to. RuntimeError when its model is gone."""
        return living(self._gate)

    @property
    def layer_idx(self) -> int:
        return self.gate.layer_idx

    @property
    def slot_shape(self) -> tuple[int, int]:
        """Hc, and the head dim of what the slots hold as values."""
        return max(self.gate.num_kv_heads, self.gate.num_importance_heads), self.gate.head_dim

    def _num_heads(self, key_states: torch.Tensor) -> int:
        return self.slot_shape[0]

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `OfferingLayer.update`; latents may come instead of keys and values.

        Raises ValueError also when the settings of the model have changed since the first token.
        """
        self._check_settings()
        if not self.gate.is_latent:
            self.receive(key_states, value_states)
        self._offer(key_states, value_states)
        return key_states, value_states

    def _check_settings(self) -> None:
        gate = self.gate
        self.check_attended()
        if gate.config is not self._settings:
            self._change_settings(gate)

    def _change_settings(self, gate) -> None:
        """Importances that were computed in another way cannot be ranked together, nor can windows be widened."""
        before, now = self._settings.to_values(), gate.config.to_values()
        changed = [name for name, value in now.items() if value != before[name]]
        if changed and self.num_rows:
            before, now = ({name: values[name] for name in changed} for values in (before, now))
            raise ValueError(
                f"the settings of layer {gate.layer_idx} must be {before}, as when this DynamicMaskCache took its "
                f"first token, got {now}; make a new DynamicMaskCache(model)"
            )
        self._settings = gate.config
        if gate.windows != self.windows:
            self._release()
            self.windows = gate.windows

    def _importance_of(self, value: torch.Tensor) -> torch.Tensor:
        importance = importance_of(self.gate, value)
        num_heads = self.keys.shape[1]
        return importance.expand(-1, num_heads, -1) if importance.shape[1] == 1 else importance
