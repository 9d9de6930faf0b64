"""Eviction: which keys of a pruned set survive a token, because the next query sees them or they still compete.

A key that falls out of the top K never comes back, so what a cache must hold after a token is what the next
query can see, its own token aside: the sinks, the last r - 1 tokens, and the K best of the older ones. One more
token makes room by dropping exactly one key, the worst of those that compete: no sort is needed for it.
"""

import torch

from flash_dmattn.arguments import check_windows
from flash_dmattn.ranking import comparable, priority
from flash_dmattn.visibility import NEVER


def cache_capacity(keep_window_size: int, local_window_size: int = 0) -> int:
    """Returns the most keys per head that must outlive a token: w, or w - 1 when the next token is always local."""
    return keep_window_size - (local_window_size > 0)


def find_victim(
    importance: torch.Tensor,
    positions: torch.Tensor,
    next_position: torch.Tensor,
    *,
    num_sink_tokens: int = 0,
    local_window_size: int = 0,
) -> torch.Tensor:
    """Finds the one slot per head to give up: an empty one, else the worst key that competes for the next query.

    The worst is the least important, the oldest on a tie. Equals what `select_survivors` leaves out when it has
    to leave out one.

    importance: (B, Hi, n) floating point; positions: (B, Hi, n) int32, -1 for an empty slot.
    next_position: (B,) int32, the position that the next real token of each batch row will have.

    Returns (B, Hi) int64, indices into n.
    """
    next_position = next_position.view(-1, 1, 1)
    rank = priority(comparable(importance), positions, next_position, num_sink_tokens, local_window_size)
    tied = rank == rank.amin(dim=-1, keepdim=True)
    return positions.masked_fill(~tied, NEVER).argmin(dim=-1)


def select_survivors(
    importance: torch.Tensor,
    positions: torch.Tensor,
    next_position: torch.Tensor,
    *,
    keep_window_size: int,
    num_sink_tokens: int = 0,
    local_window_size: int = 0,
) -> torch.Tensor:
    """Finds the keys that the next query can see or that still compete, at most w per head.

    Keys hidden by a sliding window survive as long as they are in the top K, because they still compete. How many
    indices come back depends on shapes alone, so no device is waited for.

    importance: (B, Hi, n) floating point; positions: (B, Hi, n) int32, true positions in any order, -1 for an
        empty slot (empty slots are given up first).
    next_position: (B,) int32, the position that the next real token of each batch row will have.

    Returns (B, Hi, min(n, cache_capacity(w, r))) int64, indices into n, best first.
    Raises ValueError for window sizes that do not fit each other.
    """
    check_windows(keep_window_size, num_sink_tokens, local_window_size)
    next_position = next_position.view(-1, 1, 1)
    rank = priority(comparable(importance), positions, next_position, num_sink_tokens, local_window_size)
    newest_first = positions.argsort(dim=-1, descending=True, stable=True)
    best_first = rank.gather(-1, newest_first).argsort(dim=-1, descending=True, stable=True)
    order = newest_first.gather(-1, best_first)
    return order[..., : cache_capacity(keep_window_size, local_window_size)]
