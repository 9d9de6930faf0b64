"""Ranking: importances as the numbers that are compared, who competes with them, and which keys survive a token.

A key that falls out of the top K never comes back, so what a cache must hold after a token is what the next query can
see, its own token aside: the sinks, the last r - 1 tokens, and the K best of the older ones. One more token makes room
by dropping exactly one key, the worst of those that compete: no sort is needed for it.
"""

import torch

from flash_dmattn.arguments import check_windows
from flash_dmattn.visibility import NEVER


def comparable(importance: torch.Tensor) -> torch.Tensor:
    """Maps importances to the float32 (or float64) numbers that are compared and added as bias.

    NaN becomes -inf, +inf the largest float32, -0.0 becomes +0.0. Differentiable; what was not finite gets no
    gradient. Shape and device are kept.
    """
    if importance.dtype != torch.float64:
        importance = importance.float()
    largest = torch.finfo(torch.float32).max
    return torch.nan_to_num(importance, nan=-torch.inf, posinf=largest, neginf=-torch.inf) + 0.0


def as_integers(importance: torch.Tensor) -> torch.Tensor:
    """Returns int32 of the same order as these float32 of any shape, none of them NaN or -0.0."""
    bits = importance.contiguous().view(torch.int32)
    return torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


def priority(
    importance: torch.Tensor,
    positions: torch.Tensor,
    query_position: torch.Tensor,
    num_sink_tokens: int,
    local_window_size: int,
) -> torch.Tensor:
    """Returns what keys of a pruned set are ranked by for a query, the highest first.

    It is the importance, but +inf for sinks and local keys, which need not compete, and -inf for empty slots.

    importance: (B, Hi, n), as `comparable` returns it. positions: (B, Hi, n) integers, -1 for an empty slot.
    query_position: (B, 1, 1) or (B, Hi, 1) integers.
    """
    exempt = (positions < num_sink_tokens) | (query_position - positions < local_window_size)
    return importance.masked_fill(exempt, torch.inf).masked_fill(positions < 0, -torch.inf)


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
    count = torch.sym_min(rank.shape[-1], cache_capacity(keep_window_size, local_window_size))
    return _best_first(rank, positions, count)


def _best_first(rank: torch.Tensor, positions: torch.Tensor, count: int) -> torch.Tensor:
    """Returns the indices (B, Hi, count) of the highest ranks, the highest first, of equal ones the newest first."""
    if rank.dtype == torch.float32:
        number = (as_integers(rank).long() << 32) + positions + 1  # with 0 behind what has no position
        return number.topk(count, dim=-1).indices
    newest_first = positions.argsort(dim=-1, descending=True, stable=True)
    best_first = rank.gather(-1, newest_first).argsort(dim=-1, descending=True, stable=True)
    return newest_first.gather(-1, best_first)[..., :count]
