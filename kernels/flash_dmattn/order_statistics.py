"""The k-th smallest value of many ranges of a sequence at once, by a wavelet matrix.

A wavelet matrix sorts a sequence bit by bit, most significant first, and remembers at every level how many zeros
stand before each place. A range then narrows to the values that share its answer's leading bits, one level at a
time: log2(N) passes over the data answer a query for every element, without a loop over elements.
"""

import torch

from flash_dmattn.dispatch import ORDER_STATISTICS, find


def kth_smallest_in_ranges(sequence: torch.Tensor, low: torch.Tensor, high: torch.Tensor, k: int) -> torch.Tensor:
    """Returns, for every i, the k-th smallest (from 0) value of `sequence[..., low_i:high_i]`.

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
