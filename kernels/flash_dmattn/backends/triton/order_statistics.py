"""The wavelet matrix of `flash_dmattn.competition` in base 4: two kernels for every two bits, in int32."""

import torch
import triton
import triton.language as tl

_BLOCK = 1024  # places that a program serves; three counts below 1024 share an int32


def kth_smallest_in_ranges(sequence: torch.Tensor, low: torch.Tensor, high: torch.Tensor, k: int) -> torch.Tensor:
    """Equals `flash_dmattn.competition.kth_smallest_in_ranges`, for (R, N) ranges; any integer type."""
    num_rows, length = sequence.shape
    device = sequence.device
    sequence, low, high = (tensor.to(torch.int32, copy=True) for tensor in (sequence, low, high))
    remaining = torch.full_like(low, k)
    answer = torch.zeros_like(low)
    moved = torch.empty_like(sequence)
    inside = torch.empty_like(sequence)
    num_blocks = triton.cdiv(length, _BLOCK)
    num_levels = triton.cdiv(max(1, (length - 1).bit_length()), 2)
    totals = torch.empty(num_rows, 3, num_blocks + 1, dtype=torch.int32, device=device)
    finished = torch.zeros(num_levels, num_rows, dtype=torch.int32, device=device)
    grid = (num_blocks, num_rows)
    for level in range(num_levels):
        shift = 2 * (num_levels - 1 - level)
        _count_digits[grid](
            sequence,
            inside,
            totals,
            finished[level],
            length,
            num_blocks,
            shift,
            BLOCK=_BLOCK,
            BLOCKS=triton.next_power_of_2(num_blocks),
        )
        _descend[grid](
            sequence, moved, inside, totals, low, high, remaining, answer, length, num_blocks, shift, BLOCK=_BLOCK
        )
        sequence, moved = moved, sequence
    return answer.long()


@triton.jit
def _count_digits(
    sequence_ptr,  # (R, N)
    inside_ptr,  # (R, N), the digits 0, 1 and 2 before a place within its block, 10 bits each
    totals_ptr,  # (R, 3, blocks + 1), digits before a block; behind the last block all of them
    finished_ptr,  # (R,), programs of a row that have counted
    length,
    num_blocks,
    shift,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    block = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    place = block * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(sequence_ptr + row * length + place, mask=place < length, other=-1)
    digit = (value >> shift) & 3
    counted = tl.where(digit < 3, 1 << (10 * digit), 0)
    tl.store(inside_ptr + row * length + place, tl.cumsum(counted, axis=0) - counted, mask=place < length)
    totals_ptr += row * 3 * (num_blocks + 1)
    for one in tl.static_range(3):
        count = tl.sum((digit == one).to(tl.int32), axis=0)
        tl.store(totals_ptr + one * (num_blocks + 1) + block, count)
    # The last program of a row to get here turns the counts into counts before.
    tl.debug_barrier()
    if tl.atomic_add(finished_ptr + row, 1) == num_blocks - 1:
        blocks = tl.arange(0, BLOCKS)
        for one in tl.static_range(3):
            address = totals_ptr + one * (num_blocks + 1) + blocks
            counts = tl.load(address, mask=blocks < num_blocks, other=0, cache_modifier=".cg")
            before = tl.cumsum(counts, axis=0) - counts
            tl.debug_barrier()
            tl.store(address, before, mask=blocks < num_blocks)
            tl.store(totals_ptr + one * (num_blocks + 1) + num_blocks, tl.sum(counts, axis=0))


@triton.jit
def _digits_before(inside_ptr, totals_ptr, place, is_valid, length, num_blocks, BLOCK: tl.constexpr):
    """Returns how often the digits 0, 1, 2 and 3 stand before `place`; place = N asks for all of them."""
    is_end = place >= length
    block = tl.where(is_end, num_blocks, place // BLOCK)
    packed = tl.load(inside_ptr + place, mask=is_valid & ~is_end, other=0)
    zeros = tl.load(totals_ptr + block, mask=is_valid, other=0) + (packed & 1023)
    ones = tl.load(totals_ptr + num_blocks + 1 + block, mask=is_valid, other=0) + ((packed >> 10) & 1023)
    twos = tl.load(totals_ptr + 2 * (num_blocks + 1) + block, mask=is_valid, other=0) + ((packed >> 20) & 1023)
    return zeros, ones, twos, place - zeros - ones - twos


@triton.jit
def _pick(digit, zero, one, two, three):
    return tl.where(digit < 2, tl.where(digit == 0, zero, one), tl.where(digit == 2, two, three))


@triton.jit
def _descend(
    sequence_ptr,  # (R, N)
    moved_ptr,  # (R, N), receives the sequence sorted, stably, by its digit
    inside_ptr,  # (R, N)
    totals_ptr,  # (R, 3, blocks + 1)
    low_ptr,  # (R, N)
    high_ptr,  # (R, N)
    remaining_ptr,  # (R, N)
    answer_ptr,  # (R, N)
    length,
    num_blocks,
    shift,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(1).to(tl.int64)
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    is_valid = place < length
    offset = row * length + place
    inside_ptr += row * length
    totals_ptr += row * 3 * (num_blocks + 1)
    first_one = tl.load(totals_ptr + num_blocks)
    first_two = first_one + tl.load(totals_ptr + 2 * num_blocks + 1)
    first_three = first_two + tl.load(totals_ptr + 3 * num_blocks + 2)

    low = tl.load(low_ptr + offset, mask=is_valid, other=0)
    high = tl.load(high_ptr + offset, mask=is_valid, other=0)
    remaining = tl.load(remaining_ptr + offset, mask=is_valid, other=0)
    answer = tl.load(answer_ptr + offset, mask=is_valid, other=0)
    low_0, low_1, low_2, low_3 = _digits_before(inside_ptr, totals_ptr, low, is_valid, length, num_blocks, BLOCK)
    high_0, high_1, high_2, high_3 = _digits_before(inside_ptr, totals_ptr, high, is_valid, length, num_blocks, BLOCK)
    below_1 = high_0 - low_0
    below_2 = below_1 + high_1 - low_1
    below_3 = below_2 + high_2 - low_2
    digit = (remaining >= below_1).to(tl.int32) + (remaining >= below_2) + (remaining >= below_3)
    first = _pick(digit, 0, first_one, first_two, first_three)
    tl.store(remaining_ptr + offset, remaining - _pick(digit, 0, below_1, below_2, below_3), mask=is_valid)
    tl.store(answer_ptr + offset, answer | (digit << shift), mask=is_valid)
    tl.store(low_ptr + offset, first + _pick(digit, low_0, low_1, low_2, low_3), mask=is_valid)
    tl.store(high_ptr + offset, first + _pick(digit, high_0, high_1, high_2, high_3), mask=is_valid)

    value = tl.load(sequence_ptr + offset, mask=is_valid, other=0)
    digit = (value >> shift) & 3
    own_0, own_1, own_2, own_3 = _digits_before(inside_ptr, totals_ptr, place, is_valid, length, num_blocks, BLOCK)
    first = _pick(digit, 0, first_one, first_two, first_three)
    destination = first + _pick(digit, own_0, own_1, own_2, own_3)
    tl.store(moved_ptr + row * length + destination, value, mask=is_valid)
