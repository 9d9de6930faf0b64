"""What a cache must show and keep, written out from the definition with N x N comparisons."""

import torch


def positions_of(padding_mask):
    """Positions (B, N) that count real tokens, -1 for padding. padding_mask: (B, N) bool."""
    return torch.where(padding_mask, padding_mask.cumsum(1) - 1, -1)


def query_rows(view, size):
    """Rows (B or 1, T) of the queries of a view of `size` new tokens, -1 for padding."""
    if view.query_positions is not None:
        return view.query_positions
    assert view.is_ordered
    num_keys = view.key.shape[2]
    return torch.arange(num_keys - size, num_keys, device=view.key.device)[None]


def _beats(importance, positions):
    """beats[b, h, i, j]: key i beats key j, by (importance, position)."""
    strength = torch.where(importance.isnan(), -torch.inf, importance)
    ours, theirs = strength.unsqueeze(3), strength.unsqueeze(2)
    newer = positions[:, None, :, None] > positions[:, None, None, :]
    return (ours > theirs) | ((ours == theirs) & newer)


def in_top(importance, positions, t, *, keep_window_size, num_sink_tokens, local_window_size):
    """Which keys are among the K best of those that compete for a query at t: bool (B, H, N). t: (B,)."""
    p, t = positions.unsqueeze(1), t.view(-1, 1, 1)
    competes = ((p >= num_sink_tokens) & (t - p >= local_window_size)).expand_as(importance)
    num_better = (_beats(importance, positions) & competes.unsqueeze(3)).sum(2)
    return competes & (num_better < keep_window_size - num_sink_tokens - local_window_size)


def sees(importance, positions, t, *, sliding_window, **windows):
    """Which keys a query at position t sees: bool (B, H, N). t: (B,), -1 for a padded query."""
    p, at = positions.unsqueeze(1), t.view(-1, 1, 1)
    seen = in_top(importance, positions, t, **windows)
    seen = seen | (p < windows["num_sink_tokens"]) | (at - p < windows["local_window_size"])
    seen = seen & (p >= 0) & (p <= at) & (at >= 0)
    return seen if sliding_window is None else seen & (at - p < sliding_window)


def survives(importance, positions, next_position, **windows):
    """Which keys must be kept before the token at next_position: bool (B, H, N)."""
    p, at = positions.unsqueeze(1), next_position.view(-1, 1, 1)
    kept = in_top(importance, positions, next_position, **windows)
    kept = kept | (p < windows["num_sink_tokens"]) | (at - p < windows["local_window_size"])
    return kept & (p >= 0)
