"""Decoding in one launch: it appends a token to fixed slots, evicts, attends, and finds the next victim.

The slots of a head are split over programs. Each attends to its slots and finds the worst key among them; the program
that owns the victim of this step also writes the token there. The last program of a head to finish puts the parts
together. The grid depends on shapes alone and no program waits for another, so a CUDA graph can hold the step.
"""

import functools

import torch
import triton
import triton.language as tl

from flash_dmattn.backends.triton.configs import DecodeConfig, decode_config
from flash_dmattn.backends.triton.float8 import into_float16, round_to_float8, weighted_sum
from flash_dmattn.backends.triton.tiles import LOG2E, tanh
from flash_dmattn.calls import DecodeCall
from flash_dmattn.float8 import NUMBERS

NO_WINDOW = 2**31 - 1


def run_decode(call: DecodeCall, config: DecodeConfig | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Changes the slots. Returns out (B, 1, H, Dv) and lse (B, H, 1) float32."""
    slots, rows = call.slots, call.rows
    batch = call.query.shape[0]
    _, heads, num_slots, head_dim = slots.keys.shape
    value_dim = slots.values.shape[3]
    group_size = call.query.shape[2] // heads
    config = config or decode_config(batch * heads, num_slots, call.query)
    num_splits, block_s, group_rows, block_d, block_v = _sizes(
        num_slots, config.split_size, group_size, head_dim, value_dim
    )
    num_parts = batch * heads * num_splits
    out = call.query.new_empty(*call.query.shape[:3], value_dim)
    lse = torch.empty(batch, call.query.shape[2], 1, dtype=torch.float32, device=out.device)
    parts = torch.empty(num_parts * group_size, value_dim, dtype=torch.float32, device=out.device)
    sums = torch.empty(num_parts * group_size, 2, dtype=torch.float32, device=out.device)
    worst = torch.empty(num_parts, 2, dtype=torch.int64, device=out.device)
    padding_mask = call.padding_mask
    _decode[(batch * heads, num_splits)](
        out,
        lse,
        call.query,
        call.key,
        call.value,
        call.importance,
        out if padding_mask is None else padding_mask,
        out if rows is None else rows.contiguous(),
        *slots,
        parts,
        sums,
        worst,
        *call.query.stride()[::2],
        *call.key.stride()[::2],
        *call.value.stride()[::2],
        *call.importance.stride()[:2],
        0 if padding_mask is None else padding_mask.stride(0),
        num_slots,
        call.num_sink_tokens,
        call.local_window_size,
        NO_WINDOW if call.sliding_window is None else min(call.sliding_window, NO_WINDOW),
        call.softmax_scale,
        call.softcap,
        HEADS=heads,
        GROUP=group_size,
        HEADS_PER_KV=heads // call.key.shape[2],
        HEAD_DIM=head_dim,
        VALUE_DIM=value_dim,
        GROUP_ROWS=group_rows,
        BLOCK_G=max(16, group_rows),
        BLOCK_D=block_d,
        BLOCK_V=block_v,
        BLOCK_N=config.block_n,
        SPLIT=config.split_size,
        SPLITS=num_splits,
        BLOCK_S=block_s,
        EVEN=num_slots % config.split_size == 0 and (head_dim, value_dim) == (block_d, block_v),
        HAS_PADDING=padding_mask is not None,
        HAS_ROWS=rows is not None,
        ROUNDED=slots.keys.dtype == NUMBERS,
        HAS_BIAS=call.add_importance_bias,
        HAS_SOFTCAP=call.softcap > 0,
        PRECISION="ieee" if call.query.dtype == torch.float32 else "tf32",
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return out, lse


@functools.cache
def _sizes(
    num_slots: int, split_size: int, group_size: int, head_dim: int, value_dim: int
) -> tuple[int, int, int, int, int]:
    """Programs of a head, and the powers of 2 that hold them, a group's heads, a key and a value."""
    num_splits = -(-num_slots // split_size)
    sizes = num_splits, group_size, head_dim, value_dim
    block_s, group_rows, block_d, block_v = map(triton.next_power_of_2, sizes)
    return num_splits, block_s, group_rows, max(16, block_d), max(16, block_v)


@triton.jit
def _decode(
    out_ptr,  # (B, 1, H, Dv)
    lse_ptr,  # (B, H, 1)
    query_ptr,  # (B, 1, H, D)
    key_ptr,  # (B, 1, Hkv, D)
    value_ptr,  # (B, 1, Hkv, Dv)
    importance_ptr,  # (B, Hc, 1)
    padding_ptr,  # (B, 1)
    rows_ptr,  # (B,), which of the R rows of the slots, negative without a token; without it R = B
    keys_ptr,  # (R, Hc, w, D)
    values_ptr,  # (R, Hc, w, Dv)
    slot_importance_ptr,  # (R, Hc, w)
    positions_ptr,  # (R, Hc, w)
    victims_ptr,  # (R, Hc)
    lengths_ptr,  # (R, Hc)
    arrivals_ptr,  # (R, Hc)
    key_scales_ptr,  # (R, Hc, w) where keys and values are ROUNDED, else (R, Hc, 0)
    value_scales_ptr,  # the same
    parts_ptr,  # (B * Hc, splits, G, Dv), weighted sums of values
    sums_ptr,  # (B * Hc, splits, G, 2), the highest logit, the sum of weights
    worst_ptr,  # (B * Hc, splits, 2): rank of the worst key, its slot
    query_batch_stride,
    query_head_stride,
    key_batch_stride,
    key_head_stride,
    value_batch_stride,
    value_head_stride,
    importance_batch_stride,
    importance_head_stride,
    padding_stride,
    num_slots,
    num_sink_tokens,
    local_window_size,
    sliding_window,
    softmax_scale,
    softcap,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEADS_PER_KV: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    GROUP_ROWS: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLIT: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_S: tl.constexpr,
    EVEN: tl.constexpr,
    HAS_PADDING: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    ROUNDED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    head = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    batch = head // HEADS
    head_in_batch = head % HEADS
    kv_head = head_in_batch // HEADS_PER_KV
    state = head  # of which head of the slots
    if HAS_ROWS:
        slots_row = tl.load(rows_ptr + batch).to(tl.int64)
        if slots_row < 0:
            _store_nothing(out_ptr, lse_ptr, head, split == 0, GROUP, GROUP_ROWS, VALUE_DIM, BLOCK_V)
            return
        state = slots_row * HEADS + head_in_batch
    now = tl.load(lengths_ptr + state)
    victim = tl.load(victims_ptr + state)
    is_real = now >= 0
    if HAS_PADDING:
        is_real = tl.load(padding_ptr + batch * padding_stride) != 0
    keys_ptr += state * num_slots * HEAD_DIM
    values_ptr += state * num_slots * VALUE_DIM
    slot_importance_ptr += state * num_slots
    positions_ptr += state * num_slots
    if ROUNDED:
        key_scales_ptr += state * num_slots
        value_scales_ptr += state * num_slots

    lane = tl.arange(0, BLOCK_G)
    dim = tl.arange(0, BLOCK_D)
    is_dim = dim < HEAD_DIM
    value_dim = tl.arange(0, BLOCK_V)
    is_value_dim = value_dim < VALUE_DIM
    query_address = query_ptr + batch * query_batch_stride + (head_in_batch * GROUP + lane)[:, None] * query_head_stride
    query = tl.load(query_address + dim[None, :], mask=(lane < GROUP)[:, None] & is_dim[None, :], other=0.0)
    query_scale = tl.full((BLOCK_G,), 1.0, tl.float32)
    if ROUNDED and query.dtype != tl.float32:
        query, query_scale = into_float16(query)

    # Whether the token takes the victim's slot counts only in the program that owns it; others may read it too late.
    new_importance = tl.load(
        importance_ptr + batch * importance_batch_stride + head_in_batch * importance_head_stride
    ).to(tl.float32)
    new_importance = tl.where(new_importance == new_importance, new_importance, float("-inf"))
    new_importance = tl.minimum(new_importance, 3.4028234663852886e38) + 0.0
    old_importance = tl.load(slot_importance_ptr + victim)
    old_position = tl.load(positions_ptr + victim)
    old_priority = _priority(old_importance, old_position, now, num_sink_tokens, local_window_size)
    new_priority = _priority(new_importance, now, now, num_sink_tokens, local_window_size)
    takes = is_real & (new_priority >= old_priority)
    after = now + is_real.to(tl.int32)

    highest = tl.full((BLOCK_G,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_G,), tl.float32)
    acc = tl.zeros((BLOCK_G, BLOCK_V), tl.float32)
    worst_rank = tl.full((BLOCK_N,), 9223372036854775807, tl.int64)
    worst_slot = tl.full((BLOCK_N,), 2147483647, tl.int32)
    for offset in range(0, SPLIT, BLOCK_N):
        slot = split * SPLIT + offset + tl.arange(0, BLOCK_N)
        row = slot.to(tl.int64)[:, None] * HEAD_DIM + dim[None, :]
        value_row = slot.to(tl.int64)[:, None] * VALUE_DIM + value_dim[None, :]
        if EVEN:
            exists = slot >= 0
            key = tl.load(keys_ptr + row)
            importance = tl.load(slot_importance_ptr + slot)
            position = tl.load(positions_ptr + slot)
            value = tl.load(values_ptr + value_row)
        else:
            exists = slot < num_slots
            key = tl.load(keys_ptr + row, mask=exists[:, None] & is_dim[None, :], other=0.0)
            importance = tl.load(slot_importance_ptr + slot, mask=exists, other=0.0)
            position = tl.load(positions_ptr + slot, mask=exists, other=-1)
            value = tl.load(values_ptr + value_row, mask=exists[:, None] & is_value_dim[None, :], other=0.0)

        is_new = (slot == victim) & takes
        visible = exists & (position >= 0) & (now - position < sliding_window) & is_real & (is_new == 0)
        if ROUNDED:
            key, value = key.to(query.dtype), value.to(query.dtype)
            key_scale = tl.load(key_scales_ptr + slot, mask=exists, other=0.0).to(tl.float32)
            value_scale = tl.load(value_scales_ptr + slot, mask=exists, other=0.0)
        logits = tl.dot(query, tl.trans(key), input_precision=PRECISION)
        if ROUNDED:
            logits *= query_scale[:, None] * key_scale[None, :]
        logits = _logits(logits, _bias(importance, HAS_BIAS)[None, :], softmax_scale, softcap, HAS_SOFTCAP)
        logits = tl.where(visible[None, :], logits, float("-inf"))
        new_highest = tl.maximum(highest, tl.max(logits, axis=1))
        shift = tl.where(new_highest == float("-inf"), 0.0, new_highest)
        weights = tl.exp2(logits - shift[:, None])
        rescale = tl.exp2(highest - shift)
        total = total * rescale + tl.sum(weights, axis=1)
        if ROUNDED:
            acc = acc * rescale[:, None] + weighted_sum(weights, value, value_scale, PRECISION)
        else:
            acc = tl.dot(weights.to(value.dtype), value, acc * rescale[:, None], input_precision=PRECISION)
        highest = new_highest

        importance = tl.where(is_new, new_importance, importance)
        position = tl.where(is_new, now, position)
        rank = _rank(_priority(importance, position, after, num_sink_tokens, local_window_size), position)
        is_worse = exists & (rank < worst_rank)
        worst_slot = tl.where(is_worse, slot, worst_slot)
        worst_rank = tl.where(is_worse, rank, worst_rank)

    writes = takes & (victim >= split * SPLIT) & (victim < (split + 1) * SPLIT)
    if writes:
        key_address = key_ptr + batch * key_batch_stride + kv_head * key_head_stride
        value_address = value_ptr + batch * value_batch_stride + kv_head * value_head_stride
        new_key = tl.load(key_address + dim, mask=is_dim, other=0.0)
        new_value = tl.load(value_address + value_dim, mask=is_value_dim, other=0.0)
        seen_key, seen_value = new_key.to(tl.float32), new_value.to(tl.float32)
        if ROUNDED:
            new_key, new_key_scale = round_to_float8(seen_key)
            new_value, new_value_scale = round_to_float8(seen_value)
            seen_key, seen_value = new_key * new_key_scale, new_value * new_value_scale
        product = tl.sum(query.to(tl.float32) * seen_key[None, :], axis=1) * query_scale
        new_logits = _logits(product, _bias(new_importance, HAS_BIAS), softmax_scale, softcap, HAS_SOFTCAP)
        highest_now = tl.maximum(highest, new_logits)
        shift_now = tl.where(highest_now == float("-inf"), 0.0, highest_now)
        weight = tl.exp2(new_logits - shift_now)
        scale = tl.exp2(highest - shift_now)
        total = total * scale + weight
        acc = acc * scale[:, None] + weight[:, None] * seen_value[None, :]
        highest = highest_now
        tl.debug_barrier()  # every thread has read the victim's slot
        key_address = keys_ptr + victim.to(tl.int64) * HEAD_DIM + dim
        value_address = values_ptr + victim.to(tl.int64) * VALUE_DIM + value_dim
        tl.store(key_address, new_key.to(keys_ptr.dtype.element_ty), mask=is_dim)
        tl.store(value_address, new_value.to(values_ptr.dtype.element_ty), mask=is_value_dim)
        if ROUNDED:
            tl.store(key_scales_ptr + victim, new_key_scale.to(key_scales_ptr.dtype.element_ty))
            tl.store(value_scales_ptr + victim, new_value_scale.to(value_scales_ptr.dtype.element_ty))
        tl.store(slot_importance_ptr + victim, new_importance)
        tl.store(positions_ptr + victim, now)

    part = (head * SPLITS + split) * GROUP + lane
    is_part = lane < GROUP
    part_address = parts_ptr + part[:, None] * VALUE_DIM + value_dim[None, :]
    tl.store(part_address, acc, mask=is_part[:, None] & is_value_dim[None, :])
    tl.store(sums_ptr + part * 2, highest, mask=is_part)
    tl.store(sums_ptr + part * 2 + 1, total, mask=is_part)
    worst_ptr += head * SPLITS * 2
    lowest = tl.min(worst_rank, axis=0)
    lowest_slot = tl.min(tl.where(worst_rank == lowest, worst_slot, 2147483647), axis=0)
    tl.store(worst_ptr + split * 2, lowest)
    tl.store(worst_ptr + split * 2 + 1, lowest_slot.to(tl.int64))
    tl.debug_barrier()  # every thread's part is in memory
    if tl.atomic_add(arrivals_ptr + state, 1, sem="acq_rel") == SPLITS - 1:
        tl.store(victims_ptr + state, _worst_slot(worst_ptr, SPLITS, BLOCK_S))
        tl.store(lengths_ptr + state, after)
        tl.store(arrivals_ptr + state, 0)
        _put_together(
            out_ptr, lse_ptr, parts_ptr, sums_ptr, head, GROUP, GROUP_ROWS, VALUE_DIM, BLOCK_V, SPLITS, BLOCK_S
        )


@triton.jit
def _store_nothing(
    out_ptr, lse_ptr, head, is_first, GROUP: tl.constexpr, GROUP_ROWS: tl.constexpr,
    VALUE_DIM: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Stores output 0 and lse -inf for a head's group, in one of its programs."""
    lane = tl.arange(0, GROUP_ROWS)
    dim = tl.arange(0, BLOCK_V)
    is_lane = (lane < GROUP) & is_first
    tl.store(lse_ptr + head * GROUP + lane, tl.full((GROUP_ROWS,), float("-inf"), tl.float32), mask=is_lane)
    address = out_ptr + (head * GROUP + lane)[:, None] * VALUE_DIM + dim[None, :]
    nothing = tl.zeros((GROUP_ROWS, BLOCK_V), out_ptr.dtype.element_ty)
    tl.store(address, nothing, mask=is_lane[:, None] & (dim < VALUE_DIM)[None, :])


@triton.jit
def _worst_slot(worst_ptr, SPLITS: tl.constexpr, BLOCK_S: tl.constexpr):
    part = tl.arange(0, BLOCK_S)
    rank = tl.load(worst_ptr + part * 2, mask=part < SPLITS, other=9223372036854775807, cache_modifier=".cg")
    slot = tl.load(worst_ptr + part * 2 + 1, mask=part < SPLITS, other=0, cache_modifier=".cg")
    slot = tl.where(rank == tl.min(rank, axis=0), slot, 2147483647)
    return tl.min(slot, axis=0).to(tl.int32)


@triton.jit
def _put_together(
    out_ptr, lse_ptr, parts_ptr, sums_ptr, head, GROUP: tl.constexpr, GROUP_ROWS: tl.constexpr,
    VALUE_DIM: tl.constexpr, BLOCK_V: tl.constexpr, SPLITS: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Weighs the parts of a head's programs and stores the output and the lse of its group."""
    lane = tl.arange(0, GROUP_ROWS)
    dim = tl.arange(0, BLOCK_V)
    split = tl.arange(0, BLOCK_S)
    is_lane = lane < GROUP
    exists = is_lane[:, None] & (dim < VALUE_DIM)[None, :]
    first = head * SPLITS * GROUP + lane
    every = (first[None, :] + split[:, None] * GROUP) * 2
    is_part = (split < SPLITS)[:, None] & is_lane[None, :]
    highest = tl.max(tl.load(sums_ptr + every, mask=is_part, other=float("-inf"), cache_modifier=".cg"), axis=0)
    shift = tl.where(highest == float("-inf"), 0.0, highest)
    total = tl.zeros((GROUP_ROWS,), tl.float32)
    acc = tl.zeros((GROUP_ROWS, BLOCK_V), tl.float32)
    for number in tl.range(0, SPLITS, loop_unroll_factor=8):
        row = first + number * GROUP
        part_highest = tl.load(sums_ptr + row * 2, mask=is_lane, other=float("-inf"), cache_modifier=".cg")
        part_total = tl.load(sums_ptr + row * 2 + 1, mask=is_lane, other=0.0, cache_modifier=".cg")
        address = parts_ptr + row[:, None] * VALUE_DIM + dim[None, :]
        part = tl.load(address, mask=exists, other=0.0, cache_modifier=".cg")
        weight = tl.exp2(part_highest - shift)
        total += part_total * weight
        acc += part * weight[:, None]
    out = acc / tl.where(total == 0, 1.0, total)[:, None]
    lse = tl.where(total == 0, float("-inf"), (tl.log2(tl.where(total == 0, 1.0, total)) + shift) / LOG2E)
    tl.store(lse_ptr + head * GROUP + lane, lse, mask=is_lane)
    out_row = (head * GROUP + lane) * VALUE_DIM
    tl.store(out_ptr + out_row[:, None] + dim[None, :], out.to(out_ptr.dtype.element_ty), mask=exists)


@triton.jit
def _priority(importance, position, now, num_sink_tokens, local_window_size):
    """Importance as compared: +inf for keys that need not compete now, -inf for empty slots."""
    exempt = (position < num_sink_tokens) | (now - position < local_window_size)
    return tl.where(position < 0, float("-inf"), tl.where(exempt, float("inf"), importance))


@triton.jit
def _rank(priority, position):
    """One number that orders keys by priority, then by position."""
    bits = priority.to(tl.int32, bitcast=True)
    ordered = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)  # as integers in the order of the floats
    return (ordered.to(tl.int64) << 32) + (position + 1).to(tl.int64)


@triton.jit
def _bias(importance, HAS_BIAS: tl.constexpr):
    """The importance as added to logits in base 2, within what a float32 can hold there."""
    if HAS_BIAS:
        bias = tl.where(importance < -2.3e38, float("-inf"), tl.minimum(importance, 2.3e38) * LOG2E)
    else:
        bias = tl.where(importance > 0, 0.0, 0.0)
    return bias


@triton.jit
def _logits(product, bias, softmax_scale, softcap, HAS_SOFTCAP: tl.constexpr):
    if HAS_SOFTCAP:
        logits = tanh(product * (softmax_scale / softcap)) * (softcap * LOG2E)
    else:
        logits = product * (softmax_scale * LOG2E)
    return logits + bias
