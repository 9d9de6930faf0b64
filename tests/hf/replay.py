"""A cache layer that checks itself: whatever happened to it, it shows what one pass over all tokens shows."""

import torch

from flash_dmattn import NEVER, select_visible
from flash_dmattn_hf.cache import layers
from flash_dmattn_hf.cache.latent import LatentCacheLayer
from flash_dmattn_hf.cache.layer import DynamicMaskCacheLayer

from .cache_definition import query_rows


class ReplayedLayer(DynamicMaskCacheLayer):
    """Keeps all importances beside the pruned ones and compares views with one-pass selection.

    stride: single tokens are compared at every stride-th row only, longer chunks always.
    """

    num_checked = 0
    stride = 1

    def _transform(self, function):
        super()._transform(function)
        if self.is_initialized:
            self.history, self.real = function(self.history), function(self.real)

    def _forget(self):
        super()._forget()
        self.history, self.real = None, None

    def _remember(self, padding_mask):
        importance = self._new[2]
        device = importance.device
        every = torch.ones(importance.shape[0], self._num_new, dtype=torch.bool, device=device)
        new = every if padding_mask is None else padding_mask.to(device, torch.bool)
        if self.history is None:
            self.history, self.real = importance[:, :, :0], new[:, :0]
        self.history = torch.cat([self.history, importance], dim=2)
        self.real = torch.cat([self.real, new], dim=1)

    def step(self, query, padding_mask=None, **options):
        self._remember(padding_mask)
        out = super().step(query, padding_mask, **options)
        if self.num_rows % self.stride == 0:
            t = torch.where(self.real[:, -1], self.lengths[:, 0] - 1, -1)[:, None, None]
            window = NEVER if self.windows.sliding_window is None else self.windows.sliding_window
            visible = (self.positions >= 0) & (t - self.positions < window) & (t >= 0)
            self._check(self.positions, visible.unsqueeze(2), 1)
        return out

    def view(self, padding_mask=None, blocks=None):
        size = self._num_new
        self._remember(padding_mask)
        view = super().view(padding_mask, blocks)
        assert self.history.shape[2] == self.num_rows
        if size > 1 or self.num_rows % self.stride == 0:
            birth, death = (bound.unsqueeze(2) for bound in view.visibility)
            t = query_rows(view, size)[:, None, :, None]
            *_, positions = self._tail.behind(self.slots, self.num_kept)
            self._check(positions, (birth <= t) & (t < death), size)
        return view

    def _check(self, positions, visible, size):
        """Compares the visible positions of each new query, (B, H, T, N + 1) with empty slots at the end."""
        places = positions.long().remainder(self.num_rows + 1).unsqueeze(2).expand(visible.shape)
        shown = torch.zeros(*visible.shape[:3], self.num_rows + 1, dtype=torch.long, device=visible.device)
        shown.scatter_add_(3, places, visible.long())
        assert torch.equal(shown, self._expected(size)), "the cache shows other keys than one pass"
        ReplayedLayer.num_checked += size

    def _expected(self, size):
        visibility = select_visible(self.history, padding_mask=self.real, **self.windows._asdict())
        birth, death = (bound.unsqueeze(2) for bound in visibility)
        t = torch.arange(self.num_rows - size, self.num_rows, device=birth.device).view(1, 1, -1, 1)
        visible = (birth <= t) & (t < death) & self.real[:, None, None] & self.real[:, None, -size:, None]
        places = torch.where(self.real, self.real.cumsum(1) - 1, self.num_rows)[:, None, None].expand(visible.shape)
        expected = torch.zeros(*visible.shape[:3], self.num_rows + 1, dtype=torch.long, device=visible.device)
        return expected.scatter_add_(3, places, visible.long())

    def evict(self):
        super().evict()
        if not self.record_past:
            assert self.num_keys <= self.windows.keep_window_size

    def crop(self, tokens_to_remove):
        super().crop(tokens_to_remove)
        if self.history is not None:
            self.history, self.real = self.history[:, :, : self.num_rows], self.real[:, : self.num_rows]
            assert self.num_keys <= self.windows.keep_window_size


class ReplayedLatents(LatentCacheLayer, ReplayedLayer):
    """The same for a layer that holds latents."""


def replay(monkeypatch):
    """Has every cache check its visible sets and its size at every step, and counts from 0."""
    monkeypatch.setattr(layers, "DynamicMaskCacheLayer", ReplayedLayer)
    monkeypatch.setattr(layers, "LatentCacheLayer", ReplayedLatents)
    monkeypatch.setattr(ReplayedLayer, "num_checked", 0)
