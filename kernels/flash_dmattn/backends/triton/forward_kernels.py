"""Forward: one program attends one query tile (tokens x group heads of one kv head) to its stretch of a key list."""

import torch
import triton
import triton.language as tl

from flash_dmattn.backends.triton.configs import BlockConfig, forward_config
from flash_dmattn.backends.triton.launch import Launch
from flash_dmattn.backends.triton.tiles import (
    LOG2E,
    find_stretch,
    gather_rows,
    is_visible,
    keep_factors,
    load_keys,
    load_scores,
    load_seed,
    load_thresholds,
    query_rows,
    query_tile,
    soft_gate,
    tanh,
)
from flash_dmattn.calls import AttentionCall


def run_forward(
    call: AttentionCall, config: BlockConfig | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns out, lse and stats, as the operator does, of a call whose keys are listed."""
    config = config or forward_config(call.query, call.weighs_pairs)
    launch = Launch(call, config.block_m)
    lists = launch.lists
    batch, seqlen_q, num_heads, _ = call.query.shape
    out = torch.empty_like(call.query, memory_format=torch.contiguous_format)
    lse = torch.empty(batch, num_heads, seqlen_q, dtype=torch.float32, device=out.device)
    stats = torch.empty(2, *lse.shape, dtype=torch.float32, device=out.device)
    grid = (lists.num_epochs * lists.tiles_per_epoch, lists.num_lists)
    _forward[grid](
        out,
        lse,
        stats,
        *launch.shared_arguments(),
        **launch.constants(),
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        **config.launch_options(),
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
    birth_ptr,  # (B, Hi, Sk)
    death_ptr,  # (B, Hi, Sk)
    start_ptr,  # (B,)
    positions_ptr,  # (B, Sq)
    entries_ptr,  # (B, Hi, epochs, capacity)
    biases_ptr,  # (B, Hi, epochs, capacity)
    sections_ptr,  # (B, Hi, epochs, 3)
    stretches_ptr,  # (B, Hi, epochs, tiles, 2)
    score_ptr,  # (B, Hi, Sk)
    threshold_ptr,  # (B, Hi, Sq)
    contested_ptr,  # (B, Hi, Sk)
    seed_ptr,  # (B,)
    softmax_scale,
    softcap,
    drop_limit,
    keep_scale,
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
    num_epochs,
    capacity,
    tiles_per_epoch,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEADS_PER_KV: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    EPOCH: tl.constexpr,
    TILE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_START: tl.constexpr,
    HAS_POSITIONS: tl.constexpr,
    HAS_SOFT: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    # Tiles of a head follow each other: programs that run together share its keys in L2.
    epoch = tl.program_id(0) // tiles_per_epoch
    tile = tl.program_id(0) % tiles_per_epoch
    head = tl.program_id(1)
    batch = head // HEADS
    head_in_batch = head % HEADS
    list_index = head.to(tl.int64) * num_epochs + epoch
    entries_ptr += list_index * capacity
    biases_ptr += list_index * capacity
    birth_ptr += head.to(tl.int64) * seqlen_k
    death_ptr += head.to(tl.int64) * seqlen_k
    score_ptr += head.to(tl.int64) * seqlen_k
    contested_ptr += head.to(tl.int64) * seqlen_k
    kv_head = (head_in_batch // HEADS_PER_KV).to(tl.int64)
    key_ptr += batch.to(tl.int64) * key_batch_stride + kv_head * key_head_stride
    value_ptr += batch.to(tl.int64) * value_batch_stride + kv_head * value_head_stride

    query_index, group_head, exists = query_tile(epoch, tile, seqlen_q, EPOCH, TILE, GROUP, BLOCK_M)
    row = query_rows(start_ptr, positions_ptr, batch, query_index, exists, seqlen_q, HAS_START, HAS_POSITIONS)
    query_head = head_in_batch * GROUP + group_head
    dim = tl.arange(0, BLOCK_D)
    query_address = query_ptr + batch.to(tl.int64) * query_batch_stride + query_index.to(tl.int64) * query_row_stride
    query_address = (query_address + query_head.to(tl.int64) * query_head_stride)[:, None] + dim[None, :]
    is_query = exists[:, None] & (dim < HEAD_DIM)[None, :]
    query = tl.load(query_address, mask=is_query, other=0.0)
    threshold = load_thresholds(threshold_ptr, head, query_index, exists, seqlen_q, HAS_SOFT)
    seed = load_seed(seed_ptr, batch, HAS_DROPOUT)

    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    highest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    begin, first_full, last_full, end = find_stretch(
        sections_ptr, stretches_ptr, list_index, tile, tiles_per_epoch, row, seqlen_k, True, BLOCK_N
    )
    # Three runs: keys of which some have died, keys that all rows see, keys of which some are not born.
    acc, highest, total = _attend(
        acc, highest, total, query, row, query_head, query_index, threshold, seed, begin, first_full, end,
        key_ptr, value_ptr, birth_ptr, death_ptr, entries_ptr, biases_ptr, score_ptr, contested_ptr,
        softmax_scale, softcap, drop_limit, keep_scale, key_row_stride, value_row_stride,
        HEAD_DIM, BLOCK_D, BLOCK_N, HAS_BIAS, HAS_SOFTCAP, HAS_SOFT, HAS_DROPOUT, PRECISION, True,
    )  # fmt: skip
    acc, highest, total = _attend(
        acc, highest, total, query, row, query_head, query_index, threshold, seed, first_full, last_full, end,
        key_ptr, value_ptr, birth_ptr, death_ptr, entries_ptr, biases_ptr, score_ptr, contested_ptr,
        softmax_scale, softcap, drop_limit, keep_scale, key_row_stride, value_row_stride,
        HEAD_DIM, BLOCK_D, BLOCK_N, HAS_BIAS, HAS_SOFTCAP, HAS_SOFT, HAS_DROPOUT, PRECISION, False,
    )  # fmt: skip
    acc, highest, total = _attend(
        acc, highest, total, query, row, query_head, query_index, threshold, seed, last_full, end, end,
        key_ptr, value_ptr, birth_ptr, death_ptr, entries_ptr, biases_ptr, score_ptr, contested_ptr,
        softmax_scale, softcap, drop_limit, keep_scale, key_row_stride, value_row_stride,
        HEAD_DIM, BLOCK_D, BLOCK_N, HAS_BIAS, HAS_SOFTCAP, HAS_SOFT, HAS_DROPOUT, PRECISION, True,
    )  # fmt: skip

    sees_any = (row >= 0) & (total != 0)  # NaN is not nothing
    acc = tl.where(sees_any[:, None], acc / tl.where(sees_any, total, 1.0)[:, None], 0.0)
    log_total = tl.log2(tl.where(sees_any, total, 1.0))
    lse = tl.where(sees_any, (highest + log_total) / LOG2E, float("-inf"))
    num_heads = HEADS * GROUP
    out_row = (batch.to(tl.int64) * seqlen_q + query_index) * num_heads + query_head
    tl.store(out_ptr + out_row[:, None] * HEAD_DIM + dim[None, :], acc.to(out_ptr.dtype.element_ty), mask=is_query)
    lse_row = (batch * num_heads + query_head).to(tl.int64) * seqlen_q + query_index
    tl.store(lse_ptr + lse_row, lse, mask=exists)
    tl.store(stats_ptr + lse_row, tl.where(sees_any, highest, float("inf")), mask=exists)
    stats_ptr += tl.num_programs(1).to(tl.int64) * GROUP * seqlen_q
    tl.store(stats_ptr + lse_row, log_total, mask=exists)


@triton.jit
def _attend(
    acc, highest, total, query, row, query_head, query_index, threshold, seed, begin, stop, end,
    key_ptr, value_ptr, birth_ptr, death_ptr, entries_ptr, biases_ptr, score_ptr, contested_ptr,
    softmax_scale, softcap, drop_limit, keep_scale, key_row_stride, value_row_stride,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, HAS_SOFT: tl.constexpr, HAS_DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """Folds the list's keys from `begin` up to `stop` into the running softmax; lanes past `end` do not count."""
    for offset in range(begin, stop, BLOCK_N):
        key_index, bias, counts = load_keys(entries_ptr, biases_ptr, offset, end, BLOCK_N, True, HAS_BIAS, MASKED)
        key = gather_rows(key_ptr, key_index, key_row_stride, counts, HEAD_DIM, BLOCK_D, MASKED)
        logits = tl.dot(query, tl.trans(key), input_precision=PRECISION)
        if HAS_SOFTCAP:
            logits = tanh(logits * (softmax_scale / softcap)) * (softcap * LOG2E)
        else:
            logits = logits * (softmax_scale * LOG2E)
        logits += bias[None, :]
        if HAS_SOFT:
            score, contested_from = load_scores(score_ptr, contested_ptr, key_index, counts)
            exponent, factor, _ = soft_gate(score[None, :], threshold[:, None], contested_from[None, :], row[:, None])
            logits += exponent
        if MASKED:
            visible = is_visible(birth_ptr, death_ptr, key_index, counts, row, True)
            logits = tl.where(visible, logits, float("-inf"))
        new_highest = tl.maximum(highest, tl.max(logits, axis=1))
        shift = tl.where(new_highest == float("-inf"), 0.0, new_highest) if MASKED else new_highest
        weights = tl.exp2(logits - shift[:, None])
        if HAS_SOFT:
            weights *= factor
        rescale = tl.exp2(highest - shift)
        total = total * rescale + tl.sum(weights, axis=1)
        value = gather_rows(value_ptr, key_index, value_row_stride, counts, HEAD_DIM, BLOCK_D, MASKED)
        if HAS_DROPOUT:
            weights *= keep_factors(
                seed, query_head[:, None], query_index[:, None], key_index[None, :], drop_limit, keep_scale
            )
        acc = tl.dot(weights.to(value.dtype), value, acc * rescale[:, None], input_precision=PRECISION)
        highest = new_highest
    return acc, highest, total
