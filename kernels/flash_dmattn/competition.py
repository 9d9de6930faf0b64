"""Competition: which keys beat which, and when the K-th of those that beat a key arrives, which evicts it.

Sorted by (importance, position), best first, the keys that beat the q-th are the first q, so its eviction time is the
K-th smallest position among them: one order statistic of a prefix per key, and no N x N comparison anywhere.
"""

import torch

from flash_dmattn.axes import PrunedAxis
from flash_dmattn.dispatch import ORDER_STATISTICS, find
from flash_dmattn.ranking import as_integers
from flash_dmattn.visibility import NEVER


def eviction_positions(axis, competes: torch.Tensor, num_contested: int) -> torch.Tensor:
    """Returns (B, Hi, Sk) int64, e_j: the first position >= p_j at which `num_contested` keys beat key j.

    axis: of `flash_dmattn.axes`. competes: (B or 1, Hi or 1, Sk) bool, the real keys that are no sinks.
    """
    shape, length = axis.importance.shape, axis.importance.shape[-1]
    position = axis.position.expand(shape)
    if num_contested == 0:
        return position.clone()
    if length <= num_contested:
        return torch.full_like(position, NEVER)
    if isinstance(axis, PrunedAxis):
        evicted_at = axis.evictions_by_backend(competes, num_contested)
        if evicted_at is not None:
            return evicted_at
    order, start = sort_competitors(axis, competes)
    places = torch.arange(length, device=order.device).expand(shape)
    index = kth_smallest_in_ranges(
        order.flatten(0, 1), start.flatten(0, 1), places.flatten(0, 1), num_contested - 1
    ).view(shape)
    index = torch.maximum(index.clamp(max=length - 1), order)
    evicted_at = torch.where(places - start < num_contested, NEVER, position.gather(-1, index))
    return torch.empty_like(evicted_at).scatter_(-1, order, evicted_at)


def sort_competitors(axis, competes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sorts the keys of every sequence, best first.

    Returns, for the sorted order, `order` (B, Hi, Sk), the key at each place, and `start` (B, Hi, Sk), the first
    place that belongs to the same sequence: a key that competes is beaten by those from `start` up to its own place.
    Keys that do not compete come last.
    """
    shape, length = axis.importance.shape, axis.importance.shape[-1]
    # The newest stands first, and every sort is stable: so it wins a tie.
    if axis.segment is None:
        # What does not compete, the sinks, is older than all that does: -inf puts it last.
        importance = torch.where(competes, axis.importance, -torch.inf)
        order = length - 1 - importance.flip(-1).argsort(dim=-1, descending=True, stable=True)
        return order, torch.zeros((), dtype=order.dtype, device=order.device).expand(shape)
    segment = torch.where(competes, axis.segment, axis.num_segments).expand(shape)
    order = length - 1 - _argsort_best_first(axis.importance.flip(-1), segment.flip(-1))
    if axis.num_segments == 1:
        return order, torch.zeros((), dtype=order.dtype, device=order.device).expand(shape)
    segment = segment.gather(-1, order)
    is_first = torch.ones_like(segment, dtype=torch.bool)
    is_first[..., 1:] = segment[..., 1:] != segment[..., :-1]
    places = torch.arange(length, device=order.device)
    return order, torch.where(is_first, places, 0).cummax(-1).values


def _argsort_best_first(importance: torch.Tensor, segment: torch.Tensor) -> torch.Tensor:
    """Sorts stably by segment, rising, then by importance, falling. Returns the indices, int64."""
    if importance.dtype == torch.float32:
        return ((segment << 32) - as_integers(importance)).argsort(dim=-1, stable=True)
    order = importance.argsort(dim=-1, descending=True, stable=True)
    return order.gather(-1, segment.gather(-1, order).argsort(dim=-1, stable=True))


def kth_smallest_in_ranges(sequence: torch.Tensor, low: torch.Tensor, high: torch.Tensor, k: int) -> torch.Tensor:
    """Returns, for every i, the k-th smallest (from 0) value of `sequence[..., low_i:high_i]`, by a wavelet matrix.

    A wavelet matrix sorts a sequence bit by bit, most significant first, and remembers at every level how many zeros
    stand before each place. A range then narrows to the values that share its answer's leading bits, one level at a
    time: log2(N) passes over the data answer a query for every element, without a loop over elements.

    sequence: (R, N) int64, values in [0, N).
    low, high: (R, M) int64, 0 <= low <= high <= N. Where a range holds fewer than k + 1 values the result is
        meaningless (but in [0, 2 * N)).
    Returns (R, M) int64.
    """
    backend = find(ORDER_STATISTICS, sequence.device, sequence, low)
    if backend is not None:
        return backend.kth_smallest_in_ranges(sequence, low, high, k)
    length = sequence.shape[-1]
    places = torch.arange(length, device=sequence.device)
    remaining = torch.full_like(low, k)
    answer = torch.zeros_like(low)
    for bit in reversed(range(max(1, (length - 1).bit_length()))):
        is_zero = (sequence >> bit) & 1 == 0
        zeros_before = torch.nn.functional.pad(is_zero.cumsum(-1), (1, 0))  # (R, N + 1)
        num_zeros = zeros_before[:, -1:]
        zeros_low, zeros_high = zeros_before.gather(-1, low), zeros_before.gather(-1, high)
        zeros_inside = zeros_high - zeros_low
        bit_is_set = remaining >= zeros_inside
        remaining = torch.where(bit_is_set, remaining - zeros_inside, remaining)
        answer = torch.where(bit_is_set, answer | (1 << bit), answer)
        low = torch.where(bit_is_set, num_zeros + low - zeros_low, zeros_low)
        high = torch.where(bit_is_set, num_zeros + high - zeros_high, zeros_high)
        rank_among_zeros = zeros_before[:, :-1]
        destination = torch.where(is_zero, rank_among_zeros, num_zeros + places - rank_among_zeros)
        sequence = torch.empty_like(sequence).scatter_(-1, destination, sequence)
    return answer
