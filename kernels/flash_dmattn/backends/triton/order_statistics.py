"""The wavelet matrix of `flash_dmattn.order_statistics` as three kernels a level, in int32."""

import torch
import triton
import triton.language as tl

_BLOCK = 1024


def kth_smallest_in_ranges(sequence: torch.Tensor, low: torch.Tensor, high: torch.Tensor, k: int) -> torch.Tensor:
    """Equals `flash_dmattn.order_statistics.kth_smallest_in_ranges`, for (R, N) ranges; any integer type."""
    num_rows, length = sequence.shape
    sequence, low, high = (tensor.to(torch.int32).contiguous() for tensor in (sequence, low, high))
    remaining = torch.full_like(low, k)
    answer = torch.zeros_like(low)
    moved = torch.empty_like(sequence)
    inside = torch.empty_like(sequence)
    num_blocks = triton.cdiv(length, _BLOCK)
    totals = torch.empty(num_rows, num_blocks + 1, dtype=torch.int32, device=sequence.device)
    low, high = low.clone(), high.clone()
    grid = (num_blocks, num_rows)
    for bit in reversed(range(max(1, (length - 1).bit_length()))):
        _count_zeros[grid](sequence, inside, totals, length, num_blocks, bit, BLOCK=_BLOCK)
        _scan_totals[(num_rows,)](totals, num_blocks, BLOCK=triton.next_power_of_2(num_blocks))
        _descend[grid](
            sequence, moved, inside, totals, low, high, remaining, answer, length, num_blocks, bit, BLOCK=_BLOCK
        )
        sequence, moved = moved, sequence
    return answer.long()


@triton.jit
def _count_zeros(
    sequence_ptr,  # (R, N)
    inside_ptr,  # (R, N), zeros before a place within its block
    totals_ptr,  # (R, blocks + 1), zeros of a block
    length,
    num_blocks,
    bit,
    BLOCK: tl.constexpr,
):
    block = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    place = block * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(sequence_ptr + row * length + place, mask=place < length, other=-1)
    is_zero = 1 - ((value >> bit) & 1)
    tl.store(inside_ptr + row * length + place, tl.cumsum(is_zero, axis=0) - is_zero, mask=place < length)
    tl.store(totals_ptr + row * (num_blocks + 1) + block, tl.sum(is_zero, axis=0))


@triton.jit
def _scan_totals(totals_ptr, num_blocks, BLOCK: tl.constexpr):
    """Turns the zeros of each block into the zeros before it, and writes their number behind the last."""
    row = tl.program_id(0).to(tl.int64)
    block = tl.arange(0, BLOCK)
    totals_ptr += row * (num_blocks + 1)
    total = tl.load(totals_ptr + block, mask=block < num_blocks, other=0)
    before = tl.cumsum(total, axis=0) - total
    tl.debug_barrier()
    tl.store(totals_ptr + block, before, mask=block < num_blocks)
    tl.store(totals_ptr + num_blocks, tl.sum(total, axis=0))


@triton.jit
def _zeros_before(inside_ptr, totals_ptr, place, is_valid, length, num_blocks, BLOCK: tl.constexpr):
    """Returns the zeros before `place`; place = N asks for all of them."""
    is_end = place >= length
    block = tl.where(is_end, num_blocks, place // BLOCK)
    before = tl.load(totals_ptr + block, mask=is_valid, other=0)
    return before + tl.load(inside_ptr + place, mask=is_valid & ~is_end, other=0)


@triton.jit
def _descend(
    sequence_ptr,  # (R, N)
    moved_ptr,  # (R, N), receives the sequence with its zeros first
    inside_ptr,  # (R, N)
    totals_ptr,  # (R, blocks + 1)
    low_ptr,  # (R, N)
    high_ptr,  # (R, N)
    remaining_ptr,  # (R, N)
    answer_ptr,  # (R, N)
    length,
    num_blocks,
    bit,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(1).to(tl.int64)
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    is_valid = place < length
    offset = row * length + place
    inside_ptr += row * length
    totals_ptr += row * (num_blocks + 1)
    num_zeros = tl.load(totals_ptr + num_blocks)

    low = tl.load(low_ptr + offset, mask=is_valid, other=0)
    high = tl.load(high_ptr + offset, mask=is_valid, other=0)
    remaining = tl.load(remaining_ptr + offset, mask=is_valid, other=0)
    answer = tl.load(answer_ptr + offset, mask=is_valid, other=0)
    zeros_low = _zeros_before(inside_ptr, totals_ptr, low, is_valid, length, num_blocks, BLOCK)
    zeros_high = _zeros_before(inside_ptr, totals_ptr, high, is_valid, length, num_blocks, BLOCK)
    zeros_inside = zeros_high - zeros_low
    is_set = remaining >= zeros_inside
    tl.store(remaining_ptr + offset, tl.where(is_set, remaining - zeros_inside, remaining), mask=is_valid)
    tl.store(answer_ptr + offset, tl.where(is_set, answer | (1 << bit), answer), mask=is_valid)
    tl.store(low_ptr + offset, tl.where(is_set, num_zeros + low - zeros_low, zeros_low), mask=is_valid)
    tl.store(high_ptr + offset, tl.where(is_set, num_zeros + high - zeros_high, zeros_high), mask=is_valid)

    value = tl.load(sequence_ptr + offset, mask=is_valid, other=0)
    rank = _zeros_before(inside_ptr, totals_ptr, place, is_valid, length, num_blocks, BLOCK)
    is_zero = ((value >> bit) & 1) == 0
    destination = tl.where(is_zero, rank, num_zeros + place - rank)
    tl.store(moved_ptr + row * length + destination, value, mask=is_valid)
