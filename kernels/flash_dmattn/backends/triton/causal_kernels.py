"""Forward of a call without intervals: keys are read in order, and the softmax takes its first shift for granted.

Exponentials are taken relative to the highest logit of a row's last block, which is looked at first. So the blocks
before it need neither a maximum nor a rescaled sum, and no mask. Where that fails, for a logit far above or a key that
weighs nothing but holds NaN, the sums show it, and the tile is done again with a running maximum.
"""

import torch
import triton
import triton.language as tl

from flash_dmattn.backends.key_lists import LARGEST_BIAS
from flash_dmattn.backends.triton.configs import BlockConfig, causal_config
from flash_dmattn.backends.triton.tiles import LOG2E, gather_rows, tanh
from flash_dmattn.calls import AttentionCall

_LARGEST_TOTAL = 2.0**64
_LARGEST_TOTAL_HALF = 2.0**15
"""Sums of weights up to which they stay as they are; below what the weights' own type holds."""


def run_causal_forward(
    call: AttentionCall, config: BlockConfig | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns out, lse and stats, as the operator does, of a call with neither intervals nor query_positions."""
    query, key, value, importance = call.query, call.key, call.value, call.importance
    config = config or causal_config(query)
    batch, seqlen_q, num_heads, head_dim = query.shape
    heads = call.num_interval_heads
    group_size = num_heads // heads
    tile_size = max(1, config.block_m // group_size)
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    lse = torch.empty(batch, num_heads, seqlen_q, dtype=torch.float32, device=query.device)
    stats = torch.empty(2, batch, num_heads, seqlen_q, dtype=torch.float32, device=query.device)
    _causal_forward[(triton.cdiv(seqlen_q, tile_size) * batch * heads,)](
        out,
        lse,
        stats,
        query,
        key,
        value,
        query if importance is None else importance,
        query if call.query_start is None else call.query_start,
        call.softmax_scale,
        call.softcap,
        *query.stride()[:3],
        *key.stride()[:3],
        *value.stride()[:3],
        seqlen_q,
        key.shape[1],
        batch * heads,
        lse.numel(),
        HEADS=heads,
        GROUP=group_size,
        HEADS_PER_KV=heads // key.shape[2],
        HEAD_DIM=head_dim,
        BLOCK_D=max(16, triton.next_power_of_2(head_dim)),
        TILE=tile_size,
        HAS_BIAS=importance is not None,
        HAS_SOFTCAP=call.softcap > 0,
        HAS_START=call.query_start is not None,
        PRECISION="ieee" if query.dtype == torch.float32 else "tf32",
        LARGEST_BIAS=LARGEST_BIAS,
        LARGEST_TOTAL=_LARGEST_TOTAL_HALF if query.dtype == torch.float16 else _LARGEST_TOTAL,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        **config.launch_options(),
    )
    return out, lse, stats


@triton.jit
def _causal_forward(
    out_ptr,  # (B, Sq, H, D)
    lse_ptr,  # (B, H, Sq)
    stats_ptr,  # (2, B, H, Sq)
    query_ptr,  # (B, Sq, H, D)
    key_ptr,  # (B, Sk, Hkv, D)
    value_ptr,  # (B, Sk, Hkv, D)
    importance_ptr,  # (B, Hi, Sk)
    start_ptr,  # (B,)
    softmax_scale,
    softcap,
    query_batch_stride,
    query_row_stride,
    query_head_stride,
    key_batch_stride,
    key_row_stride,
    key_head_stride,
    value_batch_stride,
    value_row_stride,
    value_head_stride,
    seqlen_q,
    seqlen_k,
    num_lanes,  # B * Hi
    num_stats,  # B * H * Sq
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEADS_PER_KV: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TILE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_START: tl.constexpr,
    PRECISION: tl.constexpr,
    LARGEST_BIAS: tl.constexpr,
    LARGEST_TOTAL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    # Late tiles are long and come first; heads take turns.
    tile = tl.num_programs(0) // num_lanes - 1 - tl.program_id(0) // num_lanes
    lane = tl.program_id(0) % num_lanes
    batch = (lane // HEADS).to(tl.int64)
    head = lane % HEADS
    kv_head = (head // HEADS_PER_KV).to(tl.int64)
    key_ptr += batch * key_batch_stride + kv_head * key_head_stride
    value_ptr += batch * value_batch_stride + kv_head * value_head_stride
    importance_ptr += lane.to(tl.int64) * seqlen_k

    place = tl.arange(0, BLOCK_M)
    first_query = tile * TILE
    query_index = first_query + place // GROUP
    query_head = head * GROUP + place % GROUP
    exists = (place < TILE * GROUP) & (query_index < seqlen_q)
    if HAS_START:
        start = tl.load(start_ptr + batch)
    else:
        start = seqlen_k - seqlen_q
    row = start + query_index
    dim = tl.arange(0, BLOCK_D)
    address = query_ptr + batch * query_batch_stride + query_index.to(tl.int64) * query_row_stride
    address = (address + query_head.to(tl.int64) * query_head_stride)[:, None] + dim[None, :]
    is_query = exists[:, None] & (dim < HEAD_DIM)[None, :]
    query = tl.load(address, mask=is_query, other=0.0)

    end = tl.maximum(tl.minimum(start + tl.minimum(first_query + TILE, seqlen_q), seqlen_k), 0)
    # Blocks that all rows see in full, but never the last one: there every row finds its first shift.
    num_full = tl.maximum(tl.minimum(start + first_query + 1, end - 1), 0) // BLOCK_N * BLOCK_N
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    highest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc, highest, total = _attend_with_maximum(
        acc, highest, total, query, row, num_full, end, key_ptr, value_ptr, importance_ptr, softmax_scale, softcap,
        key_row_stride, value_row_stride, HEAD_DIM, BLOCK_D, BLOCK_N, HAS_BIAS, HAS_SOFTCAP, PRECISION, LARGEST_BIAS,
    )  # fmt: skip
    for offset in range(0, num_full, BLOCK_N):
        key_index = offset + tl.arange(0, BLOCK_N)
        key = gather_rows(key_ptr, key_index, key_row_stride, key_index >= 0, HEAD_DIM, BLOCK_D, False)
        logits = _scale(tl.dot(query, tl.trans(key), input_precision=PRECISION), softmax_scale, softcap, HAS_SOFTCAP)
        if HAS_BIAS:
            logits += (tl.load(importance_ptr + key_index) * LOG2E)[None, :]
        value = gather_rows(value_ptr, key_index, value_row_stride, key_index >= 0, HEAD_DIM, BLOCK_D, False)
        weights = tl.exp2(logits - highest[:, None])
        total += tl.sum(weights, axis=1)
        acc = tl.dot(weights.to(value.dtype), value, acc, input_precision=PRECISION)
    if num_full > 0:
        is_finite = tl.min((tl.abs(acc) < float("inf")).to(tl.int32), axis=1)
        if tl.min(tl.where(total < LARGEST_TOTAL, is_finite, 0), axis=0) == 0:
            acc, highest, total = _attend_with_maximum(
                tl.zeros((BLOCK_M, BLOCK_D), tl.float32), tl.full((BLOCK_M,), float("-inf"), tl.float32),
                tl.zeros((BLOCK_M,), tl.float32), query, row, 0, end, key_ptr, value_ptr, importance_ptr, softmax_scale,
                softcap, key_row_stride, value_row_stride, HEAD_DIM, BLOCK_D, BLOCK_N, HAS_BIAS, HAS_SOFTCAP, PRECISION,
                LARGEST_BIAS,
            )  # fmt: skip

    sees_any = (row >= 0) & (total != 0)  # NaN is not nothing
    acc = tl.where(sees_any[:, None], acc / tl.where(sees_any, total, 1.0)[:, None], 0.0)
    log_total = tl.log2(tl.where(sees_any, total, 1.0))
    lse = tl.where(sees_any, (highest + log_total) / LOG2E, float("-inf"))
    num_heads = HEADS * GROUP
    out_row = (batch * seqlen_q + query_index) * num_heads + query_head
    tl.store(out_ptr + out_row[:, None] * HEAD_DIM + dim[None, :], acc.to(out_ptr.dtype.element_ty), mask=is_query)
    lse_row = (batch * num_heads + query_head) * seqlen_q + query_index
    tl.store(lse_ptr + lse_row, lse, mask=exists)
    tl.store(stats_ptr + lse_row, tl.where(sees_any, highest, float("inf")), mask=exists)
    tl.store(stats_ptr + num_stats + lse_row, log_total, mask=exists)


@triton.jit
def _scale(dots, softmax_scale, softcap, HAS_SOFTCAP: tl.constexpr):
    if HAS_SOFTCAP:
        logits = tanh(dots * (softmax_scale / softcap)) * (softcap * LOG2E)
    else:
        logits = dots * (softmax_scale * LOG2E)
    return logits


@triton.jit
def _attend_with_maximum(
    acc, highest, total, query, row, begin, end, key_ptr, value_ptr, importance_ptr, softmax_scale, softcap,
    key_row_stride, value_row_stride, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, PRECISION: tl.constexpr, LARGEST_BIAS: tl.constexpr,
):  # fmt: skip
    """Folds the keys from `begin` up to `end` into a softmax whose maximum runs along. A key of -inf does not count."""
    for offset in tl.range(begin, end, BLOCK_N, num_stages=1):
        key_index = offset + tl.arange(0, BLOCK_N)
        counts = key_index < end
        if HAS_BIAS:
            importance = tl.load(importance_ptr + key_index, mask=counts, other=float("-inf"))
            bias = tl.minimum(importance, LARGEST_BIAS) * LOG2E
            counts = counts & (importance > float("-inf")) & (bias > float("-inf"))  # NaN counts as -inf
            bias = tl.where(counts, bias, float("-inf"))
        key = gather_rows(key_ptr, key_index, key_row_stride, counts, HEAD_DIM, BLOCK_D, True)
        logits = _scale(tl.dot(query, tl.trans(key), input_precision=PRECISION), softmax_scale, softcap, HAS_SOFTCAP)
        if HAS_BIAS:
            logits += bias[None, :]
        visible = counts[None, :] & (key_index[None, :] <= row[:, None])
        logits = tl.where(visible, logits, float("-inf"))
        new_highest = tl.maximum(highest, tl.max(logits, axis=1))
        shift = tl.where(new_highest == float("-inf"), 0.0, new_highest)
        weights = tl.exp2(logits - shift[:, None])
        rescale = tl.exp2(highest - shift)
        total = total * rescale + tl.sum(weights, axis=1)
        value = gather_rows(value_ptr, key_index, value_row_stride, counts, HEAD_DIM, BLOCK_D, True)
        acc = tl.dot(weights.to(value.dtype), value, acc * rescale[:, None], input_precision=PRECISION)
        highest = new_highest
    return acc, highest, total
