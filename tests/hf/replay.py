"""A cache layer that checks itself: whatever happened to it, it shows what one pass over all tokens shows."""

import torch

from flash_dmattn import select_visible
from flash_dmattn_hf import cache


class ReplayedLayer(cache.DynamicMaskCacheLayer):
    """Keeps all importances beside the pruned ones and compares views with one-pass selection.

    stride: single tokens are compared at every stride-th row only, longer chunks always.
    """

    num_checked = 0
    stride = 1

    def _state(self):
        state = super()._state()
        return {**state, "history": self.history, "real": self.real} if state else state

    def lazy_initialization(self, key_states, value_states):
        super().lazy_initialization(key_states, value_states)
        batch, num_heads = self.keys.shape[:2]
        self.history = self.importance.new_empty(batch, num_heads, 0)
        self.real = torch.empty(batch, 0, dtype=torch.bool)

    def view(self, padding_mask=None):
        size = self._num_new
        new = torch.ones(self.keys.shape[0], size, dtype=torch.bool) if padding_mask is None else padding_mask
        self.history = torch.cat([self.history, self.importance[:, :, -size:]], dim=2)
        self.real = torch.cat([self.real, new], dim=1)
        view = super().view(padding_mask)
        assert self.history.shape[2] == self.num_rows
        if size > 1 or self.num_rows % self.stride == 0:
            assert torch.equal(self._shown(view), self._expected(size)), "the cache shows other keys than one pass"
            type(self).num_checked += size
        return view

    def _shown(self, view):
        """Visible positions of each new query: (B, H, T, N + 1), empty slots at the end."""
        birth, death = (bound.unsqueeze(2) for bound in view.visibility)
        t = view.query_positions[:, None, :, None]
        visible = ((birth <= t) & (t < death)).long()
        places = self.positions.long().remainder(self.num_rows + 1).unsqueeze(2).expand(visible.shape)
        shown = torch.zeros(*visible.shape[:3], self.num_rows + 1, dtype=torch.long)
        return shown.scatter_add_(3, places, visible)

    def _expected(self, size):
        visibility = select_visible(
            self.history, padding_mask=self.real, sliding_window=self._sliding_window, **self._windows
        )
        birth, death = (bound.unsqueeze(2) for bound in visibility)
        t = torch.arange(self.num_rows - size, self.num_rows).view(1, 1, -1, 1)
        visible = (birth <= t) & (t < death) & self.real[:, None, None] & self.real[:, None, -size:, None]
        places = torch.where(self.real, self.real.cumsum(1) - 1, self.num_rows)[:, None, None].expand(visible.shape)
        expected = torch.zeros(*visible.shape[:3], self.num_rows + 1, dtype=torch.long)
        return expected.scatter_add_(3, places, visible.long())

    def evict(self):
        super().evict()
        if not self.record_past:
            assert self.num_keys <= self._windows["keep_window_size"]

    def crop(self, tokens_to_remove):
        super().crop(tokens_to_remove)
        if self.is_initialized:
            self.history, self.real = self.history[:, :, : self.num_rows], self.real[:, : self.num_rows]
            assert self.num_keys <= self._windows["keep_window_size"]
