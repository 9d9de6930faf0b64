"""One layer of the constant-size, lossless key/value cache, as a model's attention module uses it.

A key that leaves the top K of its head never comes back, so it can be forgotten: `keep_window_size` slots per head,
allocated once, hold all that later tokens can see. Each key in them carries its importance and its true position: both
decide what later queries see, and neither can be recomputed once the heads have kept different tokens.
"""

import weakref

import torch

from flash_dmattn_hf.cache.offering import OfferingLayer
from flash_dmattn_hf.gates.importance import importance_of


class DynamicMaskCacheLayer(OfferingLayer):
    """The cache of one attention layer with an importance gate.

    Hc, the number of heads of the slots, is that of kv heads, or of query heads when importance is per query head. Of
    latent attention (MLA) `update` gets latents, and `receive` the keys and values that the layer makes of them.
    """

    def __init__(self, gate):
        super().__init__(gate.windows)
        self._gate = weakref.ref(gate)

    @property
    def gate(self):
        """The gate of the attention module that this layer belongs to. RuntimeError when its model is gone."""
        gate = self._gate()
        if gate is None:
            raise RuntimeError("the model of this DynamicMaskCache no longer exists; build a new cache for the new one")
        return gate

    @property
    def layer_idx(self) -> int:
        return self.gate.layer_idx

    def _num_heads(self, key_states: torch.Tensor) -> int:
        return max(self.gate.num_kv_heads, self.gate.num_importance_heads)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `OfferingLayer.update`; latents may come instead of keys and values.

        Raises ValueError also when the gate's windows have changed since the first token.
        """
        self._check_windows()
        if not self.gate.is_latent:
            self.receive(key_states, value_states)
        self._offer(key_states, value_states)
        return key_states, value_states

    def _check_windows(self) -> None:
        gate = self.gate
        self.check_attended()
        if gate.windows != self.windows:
            self._change_windows(gate)

    def _change_windows(self, gate) -> None:
        if self.num_rows:
            raise ValueError(
                f"the windows of layer {gate.layer_idx} must be {self.windows}, as when this DynamicMaskCache took its "
                f"first token, got {gate.windows}; make a new DynamicMaskCache(model)"
            )
        self._release()
        self.windows = gate.windows

    def _importance_of(self, value: torch.Tensor) -> torch.Tensor:
        importance = importance_of(self.gate, value)
        num_heads = self.keys.shape[1]
        return importance.expand(-1, num_heads, -1) if importance.shape[1] == 1 else importance
