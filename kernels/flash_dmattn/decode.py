"""Decoding over a pruned set of keys: which of them the next query sees, and which survive it.

A key that falls out of the top K never comes back, so what a cache must hold after a token is what the next
query can see, its own token aside: the sinks, the last r - 1 tokens, and the K best of the older ones. One more
token makes room by dropping exactly one key, the worst of those that compete: no sort is needed for it.
"""

import torch

from flash_dmattn.arguments import check_windows
from flash_dmattn.importance import comparable
from flash_dmattn.visibility import NEVER, Visibility


def cache_capacity(keep_window_size: int, local_window_size: int = 0) -> int:
    """Returns the most keys per head that must outlive a token: w, or w - 1 when the next token is always local."""
    return keep_window_size - (local_window_size > 0)


def decode_visibility(
    importance: torch.Tensor,
    positions: torch.Tensor,
    query_position: torch.Tensor,
    *,
    keep_window_size: int,
    num_sink_tokens: int = 0,
    local_window_size: int = 0,
    sliding_window: int | None = None,
) -> Visibility:
    """Computes which keys the newest token sees, in O(n): all of them but at most one.

    Equals `select_visible(importance, positions=positions, ...)` at that one query, for a set of at most w + 1
    keys that lacks no key which can still be seen or still competes.

    importance: (B, Hi, n) floating point, n <= w + 1.
    positions: (B, Hi, n) int32, true positions in any order, -1 for an empty slot. The query's own key is one of them.
    query_position: (B,) int32, the newest position of each batch row, -1 when its query is padding.

    Returns birth and death, int32 (B, Hi, n), valid for that query only: birth = death for a key it does not see.
    Raises ValueError for n > w + 1 or window sizes that do not fit each other.
    """
    check_windows(keep_window_size, num_sink_tokens, local_window_size, sliding_window)
    num_keys = importance.shape[-1]
    if num_keys > keep_window_size + 1:
        raise ValueError(
            f"importance must have at most keep_window_size + 1 = {keep_window_size + 1} keys, got {num_keys}"
        )
    query_position = query_position.view(-1, 1, 1)
    hidden = positions < 0
    if sliding_window is not None:
        hidden = hidden | (query_position - positions >= sliding_window)
    death = torch.where(hidden, positions, NEVER)
    if num_keys > keep_window_size:
        priority = _priority(importance, positions, query_position, num_sink_tokens, local_window_size)
        victim = _worst(priority, positions).unsqueeze(-1)
        death = death.scatter(-1, victim, positions.gather(-1, victim))
    return Visibility(positions, death)


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
    priority = _priority(importance, positions, next_position.view(-1, 1, 1), num_sink_tokens, local_window_size)
    return _worst(priority, positions)


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
    priority = _priority(importance, positions, next_position.view(-1, 1, 1), num_sink_tokens, local_window_size)
    newest_first = positions.argsort(dim=-1, descending=True, stable=True)
    best_first = priority.gather(-1, newest_first).argsort(dim=-1, descending=True, stable=True)
    order = newest_first.gather(-1, best_first)
    return order[..., : cache_capacity(keep_window_size, local_window_size)]


def _priority(importance, positions, query_position, num_sink_tokens, local_window_size):
    """Importance as compared; +inf for keys that need not compete at `query_position`, -inf for empty slots."""
    exempt = (positions < num_sink_tokens) | (query_position - positions < local_window_size)
    return comparable(importance).masked_fill(exempt, torch.inf).masked_fill(positions < 0, -torch.inf)


def _worst(priority, positions):
    tied = priority == priority.amin(dim=-1, keepdim=True)
    return positions.masked_fill(~tied, NEVER).argmin(dim=-1)
