"""Forward under a mask and a bias: one program attends one tile of query rows of one head to its listed key tiles."""

import torch
import triton
import triton.language as tl

from flash_dmattn.backends.triton.configs import BlockConfig
from flash_dmattn.backends.triton.tiles import LOG2E, gather_rows, tanh
from flash_dmattn.calls import DenseCall
from flash_dmattn.dense.configs import forward_config, grains
from flash_dmattn.dense.launch import constants, shared_arguments
from flash_dmattn.dense.tiles import classify_tiles, list_tiles, load_bias, load_visible


def run_forward(call: DenseCall, config: BlockConfig | None = None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns out, lse and stats, as the operator does."""
    config = config or forward_config(call.query)
    batch, seqlen_q, num_heads, _ = call.query.shape
    grain_m, grain_n = grains(call.query)
    lists = list_tiles(classify_tiles(call, grain_m, grain_n), config.block_m // grain_m, config.block_n // grain_n)
    out = torch.empty_like(call.query, memory_format=torch.contiguous_format)
    lse = torch.empty(batch, num_heads, seqlen_q, dtype=torch.float32, device=out.device)
    stats = torch.empty(2, *lse.shape, dtype=torch.float32, device=out.device)
    rows, columns = lists.order.shape[2:]
    _forward[(rows * call.group_size, batch * call.key.shape[2])](
        out,
        lse,
        stats,
        *shared_arguments(call),
        lists.order,
        lists.counts,
        rows,
        columns,
        **constants(call),
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return out, lse, stats


@triton.jit
def _forward(
    out_ptr,  # (B, Sq, H, D)
    lse_ptr,  # (B, H, Sq)
    stats_ptr,  # (2, B, H, Sq)
    query_ptr,  # (B, Sq, H, D)
    key_ptr,  # (B, Sk, Hkv, D)
    value_ptr,  # (B, Sk, Hkv, D)
    mask_ptr,  # (1 or B, MASK_HEADS, 1 or Sq, 1 or Sk)
    mask_batch_stride, mask_head_stride, mask_row_stride, mask_key_stride,
    bias_ptr,  # (1 or B, BIAS_HEADS, 1 or Sq, 1 or Sk)
    bias_batch_stride, bias_head_stride, bias_row_stride, bias_key_stride,
    softmax_scale, softcap,
    query_batch_stride, query_row_stride, query_head_stride,
    key_batch_stride, key_row_stride, key_head_stride,
    value_batch_stride, value_row_stride, value_head_stride,
    seqlen_q, seqlen_k,
    order_ptr,  # (MASK_BATCHES, MASK_HEADS, rows, columns)
    counts_ptr,  # (MASK_BATCHES, MASK_HEADS, rows, 2)
    rows, columns,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, MASK_BATCHES: tl.constexpr, MASK_HEADS: tl.constexpr,
    BIAS_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, HAS_MASK: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, IS_CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    # The heads of a group follow each other, so that what they share of mask and bias is still in L2. Long rows of a
    # causal mask come first.
    tile = rows - 1 - tl.program_id(0) // GROUP
    batch, head, kv_head = split_lane(tl.program_id(1), tl.program_id(0) % GROUP, KV_HEADS, GROUP)
    mask_head = shared_head(head, KV_HEADS * GROUP, MASK_HEADS)
    mask_ptr += batch * mask_batch_stride + mask_head * mask_head_stride
    bias_ptr += batch * bias_batch_stride + shared_head(head, KV_HEADS * GROUP, BIAS_HEADS) * bias_head_stride
    key_ptr += batch * key_batch_stride + kv_head * key_head_stride
    value_ptr += batch * value_batch_stride + kv_head * value_head_stride
    mask_batch = batch if MASK_BATCHES > 1 else batch * 0
    list_row = (mask_batch * MASK_HEADS + mask_head) * rows + tile
    order_ptr += list_row * columns
    num_full = tl.load(counts_ptr + list_row * 2)
    num_listed = tl.load(counts_ptr + list_row * 2 + 1)

    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    exists = row < seqlen_q
    query = gather_rows(
        query_ptr + batch * query_batch_stride + head * query_head_stride, row, query_row_stride, exists,
        HEAD_DIM, BLOCK_D, True,
    )  # fmt: skip
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    highest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc, highest, total = _forward_run(
        acc, highest, total, query, row, 0, num_full, order_ptr, key_ptr, value_ptr,
        mask_ptr, mask_row_stride, mask_key_stride, bias_ptr, bias_row_stride, bias_key_stride,
        softmax_scale, softcap, key_row_stride, value_row_stride, seqlen_q, seqlen_k,
        HEAD_DIM, BLOCK_D, BLOCK_N, HAS_MASK, HAS_BIAS, HAS_SOFTCAP, IS_CAUSAL, PRECISION, False,
    )  # fmt: skip
    acc, highest, total = _forward_run(
        acc, highest, total, query, row, num_full, num_listed, order_ptr, key_ptr, value_ptr,
        mask_ptr, mask_row_stride, mask_key_stride, bias_ptr, bias_row_stride, bias_key_stride,
        softmax_scale, softcap, key_row_stride, value_row_stride, seqlen_q, seqlen_k,
        HEAD_DIM, BLOCK_D, BLOCK_N, HAS_MASK, HAS_BIAS, HAS_SOFTCAP, IS_CAUSAL, PRECISION, True,
    )  # fmt: skip

    sees_any = total != 0  # NaN is not nothing
    acc = tl.where(sees_any[:, None], acc / tl.where(sees_any, total, 1.0)[:, None], 0.0)
    log_total = tl.log2(tl.where(sees_any, total, 1.0))
    dim = tl.arange(0, BLOCK_D)
    out_row = (batch * seqlen_q + row) * (KV_HEADS * GROUP) + head
    tl.store(
        out_ptr + out_row[:, None] * HEAD_DIM + dim[None, :],
        acc.to(out_ptr.dtype.element_ty),
        mask=exists[:, None] & (dim < HEAD_DIM)[None, :],
    )
    place = (batch * (KV_HEADS * GROUP) + head) * seqlen_q + row
    tl.store(lse_ptr + place, tl.where(sees_any, (highest + log_total) / LOG2E, float("-inf")), mask=exists)
    tl.store(stats_ptr + place, tl.where(sees_any, highest, float("inf")), mask=exists)
    stats_ptr += tl.num_programs(1).to(tl.int64) * GROUP * seqlen_q
    tl.store(stats_ptr + place, log_total, mask=exists)


@triton.jit
def split_lane(lane, group_head, KV_HEADS: tl.constexpr, GROUP: tl.constexpr):
    """Returns batch, head and kv head as int64."""
    batch, kv_head = (lane // KV_HEADS).to(tl.int64), (lane % KV_HEADS).to(tl.int64)
    return batch, kv_head * GROUP + group_head, kv_head


@triton.jit
def shared_head(head, HEADS: tl.constexpr, OF: tl.constexpr):
    """Returns which of OF heads, 1, Hkv or H, serves a query head."""
    return head // (HEADS // OF)


@triton.jit
def _forward_run(
    acc, highest, total, query, row, first, last, order_ptr, key_ptr, value_ptr,
    mask_ptr, mask_row_stride, mask_key_stride, bias_ptr, bias_row_stride, bias_key_stride,
    softmax_scale, softcap, key_row_stride, value_row_stride, seqlen_q, seqlen_k,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, HAS_MASK: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, IS_CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """Folds the listed key tiles from `first` up to `last` into the running softmax."""
    for place in range(first, last):
        key_index = tl.load(order_ptr + place) * BLOCK_N + tl.arange(0, BLOCK_N)
        counts = key_index < seqlen_k
        key = gather_rows(key_ptr, key_index, key_row_stride, counts, HEAD_DIM, BLOCK_D, MASKED)
        logits = tl.dot(query, tl.trans(key), input_precision=PRECISION)
        if HAS_SOFTCAP:
            logits = tanh(logits * (softmax_scale / softcap)) * (softcap * LOG2E)
        else:
            logits = logits * (softmax_scale * LOG2E)
        if HAS_BIAS:
            logits += load_bias(bias_ptr, bias_row_stride, bias_key_stride, row, key_index, seqlen_q, seqlen_k)
        if MASKED:
            visible = load_visible(
                mask_ptr, mask_row_stride, mask_key_stride, row, key_index, seqlen_q, seqlen_k, HAS_MASK, IS_CAUSAL
            )
            logits = tl.where(visible, logits, float("-inf"))
        new_highest = tl.maximum(highest, tl.max(logits, axis=1))
        shift = tl.where(new_highest == float("-inf"), 0.0, new_highest)
        weights = tl.exp2(logits - shift[:, None])
        rescale = tl.exp2(highest - shift)
        total = total * rescale + tl.sum(weights, axis=1)
        value = gather_rows(value_ptr, key_index, value_row_stride, counts, HEAD_DIM, BLOCK_D, MASKED)
        acc = tl.dot(weights.to(value.dtype), value, acc * rescale[:, None], input_precision=PRECISION)
        highest = new_highest
    return acc, highest, total
