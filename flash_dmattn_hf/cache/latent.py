"""The cache layer of latent attention (MLA) with one importance for all heads: it keeps the latents of w tokens.

transformers' own cache holds one latent and one rotated key per token, which all heads share. The layer makes keys and
values of every head from them in each forward. With one importance the heads see the same tokens, so that is enough.
"""

import torch

from flash_dmattn import Blocks
from flash_dmattn_hf.cache.eviction import CacheView
from flash_dmattn_hf.cache.layer import DynamicMaskCacheLayer
from flash_dmattn_hf.cache.tail import in_order, pick
from flash_dmattn_hf.gates.importance import importance_of


class LatentCacheLayer(DynamicMaskCacheLayer):
    """As `DynamicMaskCacheLayer`, with one head of latents (B, 1, w, rank) and rotated keys (B, 1, w, rope dim).

    One forward is `update`, whose result the layer expands, `receive`, `view` and `evict`; never a `step`, because what
    a step attends to does not stand in the slots.
    """

    takes_step = False

    @property
    def slot_shape(self) -> tuple[int, int]:
        """One head, and the rope dim: rotated keys stand where values would."""
        return 1, self.gate.model_config.qk_rope_head_dim

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Takes the latents of T tokens and returns those of all n that the new tokens may see, themselves last.

        key_states: (B, 1, T, rank). value_states: (B, 1, T, rope dim). Raises what the other layers' update raises.
        """
        self._check_settings()
        self._make_room(key_states, value_states)
        self._new = key_states.to(self.dtype), value_states, None
        self._offer(key_states, value_states)
        seen, order = [], in_order(self.slots, self.num_kept)
        for name, new in zip(("keys", "values"), self._new, strict=False):
            parts = pick(getattr(self, name), order), self._tail.rows.get(name), new
            seen.append(torch.cat([part for part in parts if part is not None], dim=2))
        return tuple(seen)

    def receive(self, key: torch.Tensor, value: torch.Tensor) -> None:
        """Takes the keys (B, H, n, D) and values (B, H, n, Dv) made of the latents, those of new tokens last."""
        latent, rotated, _ = self._new
        self._new = latent, rotated, importance_of(self.gate, value[:, :, -self._num_new :])
        self._expanded = key, value

    def view(self, padding_mask: torch.Tensor | None = None, blocks: Blocks | None = None) -> CacheView:
        """As for other layers; key and value are those of `receive`, importance and visibility (B, 1, n)."""
        view = super().view(padding_mask, blocks)
        (key, value), self._expanded = self._expanded, None
        return view._replace(key=key, value=value)
