"""The soft cut in one launch, and its gradient in one: a program walks a document of one head, block after block.

A row evicts at most one key, so `dying` tells for every row which. Down the rows, the best key evicted so far is a
running maximum over it; up the rows, the worst kept key is a running minimum, which starts from the least of the keys
that survive. Keys are compared as int64: the importance, as an integer in the order of the floats, then the position.

Each key is at the cut in one run of rows. So its gradient is a sum over a run, taken in the order of the rows.
"""

import torch
import triton
import triton.language as tl

from flash_dmattn.calls import CutCall

_BLOCK = 2048  # rows that a program serves at a time
# Their low halves are key -1; no importance has their high halves, which are patterns of NaN.
_BELOW_ALL = tl.constexpr(-(2**63) + 2**32 - 1)
_ABOVE_ALL = tl.constexpr(2**63 - 1)
_NEVER = tl.constexpr(2**31 - 1)
_SMALLEST_DEVIATION = tl.constexpr(1e-6)


def run_cut(call: CutCall) -> tuple[torch.Tensor, ...]:
    """Returns score, threshold, contested_from, cut and scale, as the operator does."""
    batch, num_heads, seqlen_k = call.importance.shape
    device = call.importance.device
    contested_from = torch.empty(batch, num_heads, seqlen_k, dtype=torch.int32, device=device)
    dying = torch.empty_like(contested_from)
    score = torch.empty_like(contested_from, dtype=torch.float32)
    cut = torch.empty(2, batch, num_heads, call.seqlen_q, dtype=torch.int32, device=device)
    threshold = torch.empty_like(cut[0], dtype=torch.float32)
    scale = torch.empty(batch, num_heads, call.num_documents, dtype=torch.float64, device=device)
    fixed, temperature = call.fixed_temperature, call.temperature
    if temperature is not None and temperature.device != device:  # on the CPU, where reading it waits for nothing
        fixed, temperature = float(temperature), None
    optional = (call.contested_from, call.padding_mask, call.cu_seqlens, temperature)
    _cut[(call.num_documents, batch * num_heads)](
        score,
        threshold,
        contested_from,
        cut,
        scale,
        dying,
        call.importance,
        call.death,
        *(dying if tensor is None else tensor for tensor in optional),
        fixed,
        *call.importance.stride(),
        num_heads,
        call.seqlen_q,
        seqlen_k,
        call.num_sink_tokens,
        call.local_window_size,
        HAS_CONTESTED=call.contested_from is not None,
        HAS_PADDING=call.padding_mask is not None,
        IS_PACKED=call.cu_seqlens is not None,
        HAS_TEMPERATURE=temperature is not None,
        HAS_KEPT=call.has_kept_keys,
        **_launch_options(seqlen_k),
    )
    return score, threshold, contested_from, cut, scale


def run_cut_backward(
    call: CutCall, cut: torch.Tensor, scale: torch.Tensor, dscore: torch.Tensor, dthreshold: torch.Tensor
) -> torch.Tensor:
    """Returns dimportance (B, Hi, Sk), in importance's dtype, the same in every run."""
    batch, num_heads, seqlen_k = call.importance.shape
    dimportance = torch.empty(call.importance.shape, dtype=torch.float32, device=call.importance.device)
    _cut_backward[(call.num_documents, batch * num_heads)](
        dimportance,
        dscore.contiguous(),
        dthreshold.contiguous(),
        cut,
        scale,
        call.importance,
        cut if call.cu_seqlens is None else call.cu_seqlens,
        *call.importance.stride(),
        num_heads,
        call.seqlen_q,
        seqlen_k,
        IS_PACKED=call.cu_seqlens is not None,
        HAS_KEPT=call.has_kept_keys,
        **_launch_options(seqlen_k),
    )
    return dimportance.to(call.importance.dtype)


def _launch_options(length: int) -> dict[str, int]:
    block = max(16, min(_BLOCK, triton.next_power_of_2(length)))
    return {"BLOCK": block, "num_warps": max(1, block // 256)}


@triton.jit
def _document(cu_seqlens_ptr, seqlen_k, IS_PACKED: tl.constexpr):
    """Returns the first row of this program's document, and the one after its last."""
    if IS_PACKED:
        begin = tl.maximum(tl.load(cu_seqlens_ptr + tl.program_id(0)).to(tl.int32), 0)
        end = tl.minimum(tl.load(cu_seqlens_ptr + tl.program_id(0) + 1).to(tl.int32), seqlen_k)
    else:
        begin = 0
        end = seqlen_k
    return begin, end


@triton.jit
def _load_importance(importance_ptr, key, row_stride, mask):
    """Loads importances as the numbers that are compared; elsewhere -inf."""
    value = tl.load(importance_ptr + key.to(tl.int64) * row_stride, mask=mask, other=float("-inf")).to(tl.float32)
    value = tl.where(value == value, tl.minimum(value, 3.4028234663852886e38), float("-inf"))
    return tl.where(value == 0.0, 0.0, value)


@triton.jit
def _in_order(value, key):
    """Returns int64 in the order of (value, key)."""
    bits = value.to(tl.int32, bitcast=True)
    return ((bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64) << 32) | key.to(tl.int64)


@triton.jit
def _value_of(place_in_order):
    bits = (place_in_order >> 32).to(tl.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b)


@triton.jit
def _smaller(a, b):
    return tl.minimum(a, b)


@triton.jit
def _add_moments(count, mean, squares, value, counts):
    """Joins a block's values to the moments so far: their number, their mean, the sum of squared distances from it."""
    value = tl.where(counts, value.to(tl.float64), 0.0)
    block_count = tl.sum(counts.to(tl.float64), axis=0)
    block_mean = tl.sum(value, axis=0) / tl.maximum(block_count, 1.0)
    distance = tl.where(counts, value - block_mean, 0.0)
    total = count + block_count
    share = block_count / tl.maximum(total, 1.0)
    step = block_mean - mean
    squares += tl.sum(distance * distance, axis=0) + step * step * count * share
    return total, mean + step * share, squares


@triton.jit
def _cut(
    score_ptr,  # (B, Hi, Sk)
    threshold_ptr,  # (B, Hi, Sq)
    contested_ptr,  # (B, Hi, Sk), receives contested_from
    cut_ptr,  # (2, B, Hi, Sq), receives the best evicted and the worst kept key
    scale_ptr,  # (B, Hi, docs)
    dying_ptr,  # (B, Hi, Sk), receives the key that dies at a row
    importance_ptr,  # (B, Hi, Sk), any strides
    death_ptr,  # (B, Hi, Sk)
    given_contested_ptr,  # (B, Hi, Sk)
    padding_ptr,  # (B, Sk)
    cu_seqlens_ptr,  # (docs + 1,)
    temperature_ptr,  # ()
    temperature,
    batch_stride,
    head_stride,
    row_stride,
    num_heads,
    seqlen_q,
    seqlen_k,
    num_sink_tokens,
    local_window_size,
    HAS_CONTESTED: tl.constexpr,
    HAS_PADDING: tl.constexpr,
    IS_PACKED: tl.constexpr,
    HAS_TEMPERATURE: tl.constexpr,
    HAS_KEPT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    lane = tl.program_id(1).to(tl.int64)
    begin, end = _document(cu_seqlens_ptr, seqlen_k, IS_PACKED)
    importance_ptr += lane // num_heads * batch_stride + lane % num_heads * head_stride
    padding_ptr += lane // num_heads * seqlen_k
    score_ptr += lane * seqlen_k
    contested_ptr += lane * seqlen_k
    dying_ptr += lane * seqlen_k
    death_ptr += lane * seqlen_k
    given_contested_ptr += lane * seqlen_k
    first_row = seqlen_k - seqlen_q
    threshold_ptr += lane * seqlen_q - first_row
    best_ptr = cut_ptr + lane * seqlen_q - first_row
    worst_ptr = best_ptr + tl.num_programs(1).to(tl.int64) * seqlen_q
    step = tl.arange(0, BLOCK)

    for first in range(begin, end, BLOCK):
        tl.store(dying_ptr + first + step, -1, mask=first + step < end)
    tl.debug_barrier()

    count = tl.full([], 0.0, tl.float64)
    mean = tl.full([], 0.0, tl.float64)
    squares = tl.full([], 0.0, tl.float64)
    worst = tl.full([], _ABOVE_ALL, tl.int64)
    for first in range(begin, end, BLOCK):
        key = first + step
        exists = key < end
        value = _load_importance(importance_ptr, key, row_stride, exists)
        is_real = exists
        if HAS_PADDING:
            is_real = tl.load(padding_ptr + key, mask=exists, other=0) != 0
        count, mean, squares = _add_moments(count, mean, squares, value, is_real & (value > float("-inf")))
        if HAS_CONTESTED:
            contested_from = tl.load(given_contested_ptr + key, mask=exists, other=_NEVER)
        elif IS_PACKED:
            contested_from = tl.minimum(tl.where(key - begin < num_sink_tokens, end, key + local_window_size), end)
        else:
            contested_from = tl.where(key < num_sink_tokens, _NEVER, key + local_window_size)
        tl.store(contested_ptr + key, contested_from, mask=exists)
        death = tl.load(death_ptr + key, mask=exists, other=_NEVER)
        is_contested = is_real & (contested_from < end)
        tl.store(dying_ptr + death, key, mask=is_contested & (death < end))
        survivor = tl.where(is_contested & (death >= end), _in_order(value, key), _ABOVE_ALL)
        worst = tl.minimum(worst, tl.min(survivor, axis=0))
    deviation = tl.maximum(tl.sqrt(squares / tl.maximum(count, 1.0)), _SMALLEST_DEVIATION)
    if HAS_TEMPERATURE:
        scale = 1.0 / (tl.load(temperature_ptr).to(tl.float64) * deviation)
    else:
        scale = 1.0 / (temperature * deviation)
    tl.store(scale_ptr + lane * tl.num_programs(0) + tl.program_id(0), scale)
    tl.debug_barrier()

    best = tl.full([], _BELOW_ALL, tl.int64)
    for first in range(begin, end, BLOCK):
        row = first + step
        exists = row < end
        # Less the mean, so that nothing is lost where the importance is large beside its spread.
        score = (_load_importance(importance_ptr, row, row_stride, exists).to(tl.float64) - mean) * scale
        tl.store(score_ptr + row, score.to(tl.float32), mask=exists)
        key = tl.load(dying_ptr + row, mask=exists, other=-1)
        evicted = _in_order(_load_importance(importance_ptr, key, row_stride, key >= 0), key)
        evicted = tl.where(key >= 0, evicted, _BELOW_ALL)
        best_so_far = tl.maximum(tl.associative_scan(evicted, 0, _larger), best)
        tl.store(best_ptr + row, best_so_far.to(tl.int32), mask=exists & (row >= first_row))
        best = tl.maximum(best, tl.max(evicted, axis=0))
    tl.debug_barrier()

    for last in range(0, end - tl.maximum(begin, first_row), BLOCK):
        row = end - 1 - last - step
        exists = (row >= begin) & (row >= first_row)
        best_key = tl.load(best_ptr + row, mask=exists, other=-1)
        threshold = _load_importance(importance_ptr, best_key, row_stride, best_key >= 0)
        if HAS_KEPT:
            # A key that is kept at this row and not at the next.
            key = tl.load(dying_ptr + row + 1, mask=exists & (row + 1 < end), other=-1)
            was_kept = tl.load(contested_ptr + key, mask=key >= 0, other=_NEVER) <= row
            taken = _in_order(_load_importance(importance_ptr, key, row_stride, was_kept), key)
            taken = tl.where(was_kept, taken, _ABOVE_ALL)
            worst_from_here = tl.minimum(tl.associative_scan(taken, 0, _smaller), worst)
            worst = tl.minimum(worst, tl.min(taken, axis=0))
            threshold = threshold / 2 + _value_of(worst_from_here) / 2
        is_gated = (best_key >= 0) & (threshold > float("-inf"))
        threshold = ((threshold.to(tl.float64) - mean) * scale).to(tl.float32)
        tl.store(threshold_ptr + row, tl.where(is_gated, threshold, float("-inf")), mask=exists)
        tl.store(best_ptr + row, tl.where(is_gated, best_key, -1), mask=exists)
        if HAS_KEPT:
            tl.store(worst_ptr + row, tl.where(is_gated, worst_from_here.to(tl.int32), -1), mask=exists)
        else:
            tl.store(worst_ptr + row, -1, mask=exists)


@triton.jit
def _add_within_run(total, is_broken, next_total, starts):
    return tl.where(starts > 0, next_total, total + next_total), is_broken | starts


@triton.jit
def _cut_backward(
    dimportance_ptr,  # (B, Hi, Sk)
    dscore_ptr,  # (B, Hi, Sk)
    dthreshold_ptr,  # (B, Hi, Sq)
    cut_ptr,  # (2, B, Hi, Sq)
    scale_ptr,  # (B, Hi, docs)
    importance_ptr,  # (B, Hi, Sk), any strides
    cu_seqlens_ptr,  # (docs + 1,)
    batch_stride,
    head_stride,
    row_stride,
    num_heads,
    seqlen_q,
    seqlen_k,
    IS_PACKED: tl.constexpr,
    HAS_KEPT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    lane = tl.program_id(1).to(tl.int64)
    begin, end = _document(cu_seqlens_ptr, seqlen_k, IS_PACKED)
    importance_ptr += lane // num_heads * batch_stride + lane % num_heads * head_stride
    dimportance_ptr += lane * seqlen_k
    dscore_ptr += lane * seqlen_k
    first_row = seqlen_k - seqlen_q
    dthreshold_ptr += lane * seqlen_q - first_row
    cut_ptr += lane * seqlen_q - first_row
    scale = tl.load(scale_ptr + lane * tl.num_programs(0) + tl.program_id(0))
    step = tl.arange(0, BLOCK)

    for first in range(begin, end, BLOCK):
        key = first + step
        exists = key < end
        is_finite = _is_finite(importance_ptr, key, row_stride, exists)
        dscore = tl.load(dscore_ptr + key, mask=exists & is_finite, other=0.0)
        tl.store(dimportance_ptr + key, (dscore.to(tl.float64) * scale).to(tl.float32), mask=exists)
    tl.debug_barrier()

    if HAS_KEPT:
        scale = scale / 2
    begin = tl.maximum(begin, first_row)
    for _ in tl.static_range(2 if HAS_KEPT else 1):
        carried = 0.0
        for first in range(begin, end, BLOCK):
            row = first + step
            exists = row < end
            key = tl.load(cut_ptr + row, mask=exists, other=-1)
            before = tl.load(cut_ptr + row - 1, mask=exists & (row > begin), other=-1)
            after = tl.load(cut_ptr + row + 1, mask=row + 1 < end, other=-1)
            dthreshold = tl.load(dthreshold_ptr + row, mask=key >= 0, other=0.0)
            starts = (key != before).to(tl.int32)
            total, is_broken = tl.associative_scan((dthreshold, starts), 0, _add_within_run)
            total += tl.where(is_broken > 0, 0.0, carried)
            carried = tl.sum(tl.where(step == BLOCK - 1, total, 0.0), axis=0)
            ends = (key >= 0) & (key != after)
            ends = ends & _is_finite(importance_ptr, key, row_stride, ends)
            so_far = tl.load(dimportance_ptr + key, mask=ends, other=0.0)
            tl.store(dimportance_ptr + key, so_far + (total.to(tl.float64) * scale).to(tl.float32), mask=ends)
        tl.debug_barrier()
        cut_ptr += tl.num_programs(1).to(tl.int64) * seqlen_q


@triton.jit
def _is_finite(importance_ptr, key, row_stride, mask):
    value = tl.load(importance_ptr + key.to(tl.int64) * row_stride, mask=mask, other=0.0).to(tl.float32)
    return tl.abs(value) < float("inf")
