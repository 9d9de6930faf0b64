"""Backward over the forward's key lists, in two kernels.

One program of the first holds a query tile and walks its keys: dquery. One program of the second holds a tile of an
epoch's key list and walks the queries that see it: dkey, dvalue and dimportance, summed over the group in registers and
added to memory once. A key stands in the list of every epoch that sees it, so these sums meet in memory: by atomic
additions, or, when they have to be reproducible, epoch after epoch.
"""

import torch
import triton
import triton.language as tl

from flash_dmattn.backends.key_lists import is_listed
from flash_dmattn.backends.triton.configs import BlockConfig, dkey_config, dquery_config
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


def run_backward(
    call: AttentionCall,
    out: torch.Tensor,
    stats: torch.Tensor,
    dout: torch.Tensor,
    dlse: torch.Tensor,
    dquery_blocks: BlockConfig | None = None,
    dkey_blocks: BlockConfig | None = None,
) -> tuple[torch.Tensor | None, ...]:
    """Returns dquery, dkey, dvalue in their dtypes, and in float32 dimportance, dscore and dthreshold or None."""
    config = dquery_blocks or dquery_config(call.query, call.weighs_pairs)
    launch = Launch(call, config.block_m)
    lists = launch.lists
    batch, seqlen_q, num_heads, head_dim = call.query.shape
    dout, dlse = dout.contiguous(), dlse.contiguous()
    delta = torch.empty_like(dlse)
    rows = batch * seqlen_q * num_heads
    constants = {**launch.constants(), "LISTED": is_listed(call)}
    _delta[(triton.cdiv(rows, 32),)](
        out, dout, dlse, delta, rows, seqlen_q, num_heads, head_dim, BLOCK_D=constants["BLOCK_D"], BLOCK=32
    )
    arguments = (dout, stats, delta, *launch.shared_arguments())

    dquery = torch.empty_like(call.query, memory_format=torch.contiguous_format)
    dthreshold = None if call.soft is None else torch.empty_like(dlse)
    _dquery[(lists.num_epochs * lists.tiles_per_epoch, lists.num_lists)](
        dquery,
        dquery if dthreshold is None else dthreshold,
        *arguments,
        **constants,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        **config.launch_options(),
    )

    config = dkey_blocks or dkey_config(call.query, call.weighs_pairs)
    heads, num_kv_heads = call.num_interval_heads, call.key.shape[2]
    # Interval heads that share a kv head add to the same sums, unless the order of additions must not matter.
    sum_heads = heads if call.deterministic else num_kv_heads
    dkey = torch.zeros(batch, call.key.shape[1], sum_heads, head_dim, dtype=torch.float32, device=out.device)
    dvalue = torch.zeros_like(dkey)
    dimportance = torch.zeros(batch, heads, call.key.shape[1], dtype=torch.float32, device=out.device)
    dscore = None if call.soft is None else torch.zeros_like(dimportance)
    per_launch = 1 if call.deterministic else lists.num_epochs
    for first_epoch in range(0, lists.num_epochs, per_launch):
        _dkey_dvalue[(triton.cdiv(lists.capacity, config.block_n), per_launch, lists.num_lists)](
            dkey,
            dvalue,
            dimportance,
            dimportance if dscore is None else dscore,
            first_epoch,
            *arguments,
            **constants,
            SUM_HEADS=sum_heads,
            TILES=triton.next_power_of_2(lists.tiles_per_epoch),
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            **config.launch_options(),
        )
    if sum_heads > num_kv_heads:
        dkey, dvalue = (total.unflatten(2, (num_kv_heads, -1)).sum(3) for total in (dkey, dvalue))
    del arguments, lists, launch, delta  # make room for the rounded gradients
    dkey = dkey.to(call.key.dtype)
    dvalue = dvalue.to(call.value.dtype)
    if dthreshold is not None:
        dthreshold = dthreshold.unflatten(1, (heads, -1)).sum(2)
    return dquery, dkey, dvalue, call.finish_dimportance(dimportance), dscore, dthreshold


@triton.jit
def _delta(
    out_ptr, dout_ptr, dlse_ptr, delta_ptr, rows, seqlen_q, num_heads, head_dim,
    BLOCK_D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """delta = rowsum(dout * out) - dlse; out, dout (B, Sq, H, D), dlse and delta (B, H, Sq)."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    dim = tl.arange(0, BLOCK_D)
    mask = (row < rows)[:, None] & (dim < head_dim)[None, :]
    address = row.to(tl.int64)[:, None] * head_dim + dim[None, :]
    out = tl.load(out_ptr + address, mask=mask, other=0.0).to(tl.float32)
    dout = tl.load(dout_ptr + address, mask=mask, other=0.0).to(tl.float32)
    head = row % num_heads
    query = row // num_heads % seqlen_q
    batch = row // num_heads // seqlen_q
    place = (batch * num_heads + head).to(tl.int64) * seqlen_q + query
    dlse = tl.load(dlse_ptr + place, mask=row < rows, other=0.0)
    tl.store(delta_ptr + place, tl.sum(out * dout, axis=1) - dlse, mask=row < rows)


@triton.jit
def _score(dots, bias, softmax_scale, softcap, HAS_SOFTCAP: tl.constexpr):
    """Returns logits in the exp2 domain and the factor that turns their gradient into that of the dot product."""
    if HAS_SOFTCAP:
        capped = tanh(dots * (softmax_scale / softcap))
        logits = capped * (softcap * LOG2E) + bias
        factor = (1 - capped * capped) * softmax_scale
    else:
        logits = dots * (softmax_scale * LOG2E) + bias
        factor = softmax_scale
    return logits, factor


@triton.jit
def _load_row_stats(stats_ptr, delta_ptr, place, exists, num_stats):
    """Returns the rows' highest logit, log2 of their sum, delta, and which rows see anything."""
    highest = tl.load(stats_ptr + place, mask=exists, other=float("inf"))
    sees_any = highest < float("inf")
    log_total = tl.load(stats_ptr + num_stats + place, mask=sees_any, other=0.0)
    delta = tl.load(delta_ptr + place, mask=sees_any, other=0.0)
    return highest, log_total, delta, sees_any


@triton.jit
def _dquery(
    dquery_ptr,  # (B, Sq, H, D)
    dthreshold_ptr,  # (B, H, Sq) float32
    dout_ptr,  # (B, Sq, H, D)
    stats_ptr,  # (2, B, H, Sq)
    delta_ptr,  # (B, H, Sq)
    query_ptr, key_ptr, value_ptr, birth_ptr, death_ptr, start_ptr, positions_ptr,
    entries_ptr, biases_ptr, sections_ptr, stretches_ptr, score_ptr, threshold_ptr, contested_ptr, seed_ptr,
    softmax_scale, softcap, drop_limit, keep_scale,
    query_batch_stride, query_row_stride, query_head_stride,
    key_batch_stride, key_row_stride, key_head_stride,
    value_batch_stride, value_row_stride, value_head_stride,
    seqlen_q, seqlen_k, num_epochs, capacity, tiles_per_epoch,
    HEADS: tl.constexpr, GROUP: tl.constexpr, HEADS_PER_KV: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, EPOCH: tl.constexpr, TILE: tl.constexpr, LISTED: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, HAS_START: tl.constexpr, HAS_POSITIONS: tl.constexpr, HAS_SOFT: tl.constexpr,
    HAS_DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
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
    address = query_ptr + batch.to(tl.int64) * query_batch_stride + query_index.to(tl.int64) * query_row_stride
    address = (address + query_head.to(tl.int64) * query_head_stride)[:, None] + dim[None, :]
    is_query = exists[:, None] & (dim < HEAD_DIM)[None, :]
    num_heads = HEADS * GROUP
    out_row = (batch.to(tl.int64) * seqlen_q + query_index) * num_heads + query_head
    out_address = out_row[:, None] * HEAD_DIM + dim[None, :]
    place = (batch * num_heads + query_head).to(tl.int64) * seqlen_q + query_index
    num_stats = tl.num_programs(1).to(tl.int64) * GROUP * seqlen_q
    highest, log_total, delta, sees_any = _load_row_stats(stats_ptr, delta_ptr, place, exists, num_stats)
    # Rows that see nothing may hold anything; zeros keep it out of the sums.
    query = tl.load(address, mask=is_query & sees_any[:, None], other=0.0)
    dout = tl.load(dout_ptr + out_address, mask=is_query & sees_any[:, None], other=0.0)
    threshold = load_thresholds(threshold_ptr, head, query_index, exists, seqlen_q, HAS_SOFT)
    seed = load_seed(seed_ptr, batch, HAS_DROPOUT)

    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    dthreshold = tl.zeros((BLOCK_M,), tl.float32)
    begin, first_full, last_full, end = find_stretch(
        sections_ptr, stretches_ptr, list_index, tile, tiles_per_epoch, row, seqlen_k, LISTED, BLOCK_N
    )
    acc, dthreshold = _dquery_run(
        acc, dthreshold, query, dout, highest, log_total, delta, row, query_head, query_index, threshold, seed,
        begin, first_full, end,
        key_ptr, value_ptr, birth_ptr, death_ptr, entries_ptr, biases_ptr, score_ptr, contested_ptr,
        softmax_scale, softcap, drop_limit, keep_scale, key_row_stride, value_row_stride,
        HEAD_DIM, BLOCK_D, BLOCK_N, LISTED, HAS_BIAS, HAS_SOFTCAP, HAS_SOFT, HAS_DROPOUT, PRECISION, True,
    )  # fmt: skip
    acc, dthreshold = _dquery_run(
        acc, dthreshold, query, dout, highest, log_total, delta, row, query_head, query_index, threshold, seed,
        first_full, last_full, end,
        key_ptr, value_ptr, birth_ptr, death_ptr, entries_ptr, biases_ptr, score_ptr, contested_ptr,
        softmax_scale, softcap, drop_limit, keep_scale, key_row_stride, value_row_stride,
        HEAD_DIM, BLOCK_D, BLOCK_N, LISTED, HAS_BIAS, HAS_SOFTCAP, HAS_SOFT, HAS_DROPOUT, PRECISION, False,
    )  # fmt: skip
    acc, dthreshold = _dquery_run(
        acc, dthreshold, query, dout, highest, log_total, delta, row, query_head, query_index, threshold, seed,
        last_full, end, end,
        key_ptr, value_ptr, birth_ptr, death_ptr, entries_ptr, biases_ptr, score_ptr, contested_ptr,
        softmax_scale, softcap, drop_limit, keep_scale, key_row_stride, value_row_stride,
        HEAD_DIM, BLOCK_D, BLOCK_N, LISTED, HAS_BIAS, HAS_SOFTCAP, HAS_SOFT, HAS_DROPOUT, PRECISION, True,
    )  # fmt: skip
    tl.store(dquery_ptr + out_address, acc.to(dquery_ptr.dtype.element_ty), mask=is_query)
    if HAS_SOFT:
        tl.store(dthreshold_ptr + place, -dthreshold, mask=exists)


@triton.jit
def _dquery_run(
    acc, dthreshold, query, dout, highest, log_total, delta, row, query_head, query_index, threshold, seed,
    begin, stop, end,
    key_ptr, value_ptr, birth_ptr, death_ptr, entries_ptr, biases_ptr, score_ptr, contested_ptr,
    softmax_scale, softcap, drop_limit, keep_scale, key_row_stride, value_row_stride,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, LISTED: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_SOFT: tl.constexpr, HAS_DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Adds the share of the list's keys from `begin` up to `stop` to dquery and to minus dthreshold.

    Lanes past `end` do not count.
    """
    CHECKED: tl.constexpr = MASKED or not LISTED
    for offset in range(begin, stop, BLOCK_N):
        key_index, bias, counts = load_keys(entries_ptr, biases_ptr, offset, end, BLOCK_N, LISTED, HAS_BIAS, MASKED)
        key = gather_rows(key_ptr, key_index, key_row_stride, counts, HEAD_DIM, BLOCK_D, CHECKED)
        value = gather_rows(value_ptr, key_index, value_row_stride, counts, HEAD_DIM, BLOCK_D, CHECKED)
        dots = tl.dot(query, tl.trans(key), input_precision=PRECISION)
        logits, factor = _score(dots, bias[None, :], softmax_scale, softcap, HAS_SOFTCAP)
        if HAS_SOFT:
            score, contested_from = load_scores(score_ptr, contested_ptr, key_index, counts)
            exponent, gate_factor, slope = soft_gate(
                score[None, :], threshold[:, None], contested_from[None, :], row[:, None]
            )
            logits += exponent
        weights = tl.exp2(logits - highest[:, None] - log_total[:, None])
        if HAS_SOFT:
            weights *= gate_factor
        if MASKED:
            visible = is_visible(birth_ptr, death_ptr, key_index, counts, row, LISTED)
            weights = tl.where(visible, weights, 0.0)
        elif not LISTED:
            weights = tl.where(counts[None, :], weights, 0.0)
        dweights = tl.dot(dout, tl.trans(value), input_precision=PRECISION)
        if HAS_DROPOUT:
            dweights *= keep_factors(
                seed, query_head[:, None], query_index[:, None], key_index[None, :], drop_limit, keep_scale
            )
        dlogits = weights * (dweights - delta[:, None])
        if HAS_SOFT:
            dthreshold += tl.sum(dlogits * slope, axis=1)
        acc = tl.dot((dlogits * factor).to(key.dtype), key, acc, input_precision=PRECISION)
    return acc, dthreshold


@triton.jit
def _dkey_dvalue(
    dkey_ptr,  # (B, Sk, SUM_HEADS, D) float32
    dvalue_ptr,  # (B, Sk, SUM_HEADS, D) float32
    dimportance_ptr,  # (B, Hi, Sk) float32
    dscore_ptr,  # (B, Hi, Sk) float32
    first_epoch,
    dout_ptr,  # (B, Sq, H, D)
    stats_ptr,  # (2, B, H, Sq)
    delta_ptr,  # (B, H, Sq)
    query_ptr, key_ptr, value_ptr, birth_ptr, death_ptr, start_ptr, positions_ptr,
    entries_ptr, biases_ptr, sections_ptr, stretches_ptr, score_ptr, threshold_ptr, contested_ptr, seed_ptr,
    softmax_scale, softcap, drop_limit, keep_scale,
    query_batch_stride, query_row_stride, query_head_stride,
    key_batch_stride, key_row_stride, key_head_stride,
    value_batch_stride, value_row_stride, value_head_stride,
    seqlen_q, seqlen_k, num_epochs, capacity, tiles_per_epoch,
    HEADS: tl.constexpr, GROUP: tl.constexpr, HEADS_PER_KV: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, EPOCH: tl.constexpr, TILE: tl.constexpr, LISTED: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, HAS_START: tl.constexpr, HAS_POSITIONS: tl.constexpr, HAS_SOFT: tl.constexpr,
    HAS_DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    SUM_HEADS: tl.constexpr, TILES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    epoch = first_epoch + tl.program_id(1)
    head = tl.program_id(2)
    batch = head // HEADS
    head_in_batch = head % HEADS
    list_index = head.to(tl.int64) * num_epochs + epoch
    offset = tl.program_id(0) * BLOCK_N
    if LISTED:
        num_dying = tl.load(sections_ptr + list_index * 3)
        num_alive = tl.load(sections_ptr + list_index * 3 + 1)
        num_listed = tl.load(sections_ptr + list_index * 3 + 2)
    else:
        num_listed = seqlen_k
    if offset < num_listed:
        kv_head = (head_in_batch // HEADS_PER_KV).to(tl.int64)
        key_ptr += batch.to(tl.int64) * key_batch_stride + kv_head * key_head_stride
        value_ptr += batch.to(tl.int64) * value_batch_stride + kv_head * value_head_stride
        key_index, bias, counts = load_keys(
            entries_ptr + list_index * capacity, biases_ptr + list_index * capacity, offset, num_listed,
            BLOCK_N, LISTED, HAS_BIAS, True,
        )  # fmt: skip
        key = gather_rows(key_ptr, key_index, key_row_stride, counts, HEAD_DIM, BLOCK_D, True)
        value = gather_rows(value_ptr, key_index, value_row_stride, counts, HEAD_DIM, BLOCK_D, True)
        key_place = head.to(tl.int64) * seqlen_k + key_index
        if HAS_SOFT:
            score, contested_from = load_scores(score_ptr, contested_ptr, key_place, counts)
        else:
            score, contested_from = bias, key_index  # nobody reads them
        seed = load_seed(seed_ptr, batch, HAS_DROPOUT)
        if LISTED:
            birth = tl.load(birth_ptr + key_place, mask=counts, other=2147483647)
            death = tl.load(death_ptr + key_place, mask=counts, other=-1)
            # The query tiles whose stretch meets this tile are a run, because begin and end only grow.
            tile = tl.arange(0, TILES)
            stretches = stretches_ptr + (list_index * tiles_per_epoch + tile) * 2
            begin = tl.load(stretches, mask=tile < tiles_per_epoch, other=2147483647)
            end = tl.load(stretches + 1, mask=tile < tiles_per_epoch, other=0)
            meets = (begin < offset + BLOCK_N) & (end > offset)
            first_token = tl.min(tl.where(meets, tile, TILES), axis=0) * TILE
            last_token = tl.minimum((tl.max(tl.where(meets, tile, -1), axis=0) + 1) * TILE, EPOCH)
            is_full = (offset >= num_dying) & (offset + BLOCK_N <= num_alive)
            first_full = tl.where(is_full, first_token, last_token)
        else:
            birth = tl.where(counts, key_index, 2147483647)
            death = tl.full((BLOCK_N,), 2147483647, tl.int32)
            start = tl.load(start_ptr + batch)
            last_token = seqlen_q
            first_token = tl.minimum(tl.maximum(offset - start, 0), last_token)
            # Whole blocks of rows come first, so that the others are whole as well.
            num_partial = tl.cdiv(tl.maximum(offset + BLOCK_N - 1 - start - first_token, 0) * GROUP, BLOCK_M) * BLOCK_M
            first_full = tl.minimum(first_token + tl.cdiv(num_partial, GROUP), last_token)
            if tl.min(counts.to(tl.int32), axis=0) == 0:
                first_full = last_token

        dkey = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
        dvalue = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
        dimportance = tl.zeros((BLOCK_N,), tl.float32)
        dscore = tl.zeros((BLOCK_N,), tl.float32)
        dkey, dvalue, dimportance, dscore = _dkey_dvalue_run(
            dkey, dvalue, dimportance, dscore, key, value, key_index, bias, score, contested_from, seed, birth, death,
            epoch, first_token, first_full,
            batch, head_in_batch, query_ptr, dout_ptr, stats_ptr, delta_ptr, start_ptr, positions_ptr, threshold_ptr,
            softmax_scale, softcap, drop_limit, keep_scale, query_batch_stride, query_row_stride, query_head_stride,
            seqlen_q, HEADS, GROUP, HEAD_DIM, BLOCK_D, EPOCH, BLOCK_M, HAS_SOFTCAP, HAS_START, HAS_POSITIONS,
            HAS_SOFT, HAS_DROPOUT, PRECISION, True,
        )  # fmt: skip
        dkey, dvalue, dimportance, dscore = _dkey_dvalue_run(
            dkey, dvalue, dimportance, dscore, key, value, key_index, bias, score, contested_from, seed, birth, death,
            epoch, first_full, last_token,
            batch, head_in_batch, query_ptr, dout_ptr, stats_ptr, delta_ptr, start_ptr, positions_ptr, threshold_ptr,
            softmax_scale, softcap, drop_limit, keep_scale, query_batch_stride, query_row_stride, query_head_stride,
            seqlen_q, HEADS, GROUP, HEAD_DIM, BLOCK_D, EPOCH, BLOCK_M, HAS_SOFTCAP, HAS_START, HAS_POSITIONS,
            HAS_SOFT, HAS_DROPOUT, PRECISION, False,
        )  # fmt: skip

        dim = tl.arange(0, BLOCK_D)
        sum_head = head_in_batch if SUM_HEADS == HEADS else kv_head
        place = (batch.to(tl.int64) * seqlen_k + key_index) * SUM_HEADS + sum_head
        place = place[:, None] * HEAD_DIM + dim[None, :]
        mask = counts[:, None] & (dim < HEAD_DIM)[None, :]
        tl.atomic_add(dkey_ptr + place, dkey, mask=mask, sem="relaxed")
        tl.atomic_add(dvalue_ptr + place, dvalue, mask=mask, sem="relaxed")
        if HAS_BIAS:
            tl.atomic_add(dimportance_ptr + key_place, dimportance, mask=counts, sem="relaxed")
        if HAS_SOFT:
            tl.atomic_add(dscore_ptr + key_place, dscore, mask=counts, sem="relaxed")


@triton.jit
def _dkey_dvalue_run(
    dkey, dvalue, dimportance, dscore, key, value, key_index, bias, score, contested_from, seed, birth, death, epoch,
    first_token, last_token,
    batch, head_in_batch, query_ptr, dout_ptr, stats_ptr, delta_ptr, start_ptr, positions_ptr, threshold_ptr,
    softmax_scale, softcap, drop_limit, keep_scale, query_batch_stride, query_row_stride, query_head_stride, seqlen_q,
    HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, EPOCH: tl.constexpr,
    BLOCK_M: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_START: tl.constexpr, HAS_POSITIONS: tl.constexpr,
    HAS_SOFT: tl.constexpr, HAS_DROPOUT: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Adds the share of the epoch's tokens from first_token up to last_token to the gradients of a key tile."""
    dim = tl.arange(0, BLOCK_D)
    num_heads = HEADS * GROUP
    num_stats = (tl.num_programs(2) * GROUP).to(tl.int64) * seqlen_q
    for lane in range(first_token * GROUP, last_token * GROUP, BLOCK_M):
        # Rows are tokens x group heads, counted through, so that every tile is full.
        flat = lane + tl.arange(0, BLOCK_M)
        query_index = epoch * EPOCH + flat // GROUP
        query_head = head_in_batch * GROUP + flat % GROUP
        exists = (flat < last_token * GROUP) & (query_index < seqlen_q)
        row = query_rows(start_ptr, positions_ptr, batch, query_index, exists, seqlen_q, HAS_START, HAS_POSITIONS)
        place = (batch * num_heads + query_head).to(tl.int64) * seqlen_q + query_index
        highest, log_total, delta, sees_any = _load_row_stats(stats_ptr, delta_ptr, place, exists, num_stats)
        is_query = sees_any[:, None] & (dim < HEAD_DIM)[None, :]
        address = query_ptr + batch.to(tl.int64) * query_batch_stride + query_index.to(tl.int64) * query_row_stride
        address = (address + query_head.to(tl.int64) * query_head_stride)[:, None] + dim[None, :]
        query = tl.load(address, mask=is_query, other=0.0)
        out_row = (batch.to(tl.int64) * seqlen_q + query_index) * num_heads + query_head
        dout = tl.load(dout_ptr + out_row[:, None] * HEAD_DIM + dim[None, :], mask=is_query, other=0.0)

        dots = tl.dot(key, tl.trans(query), input_precision=PRECISION)  # (BLOCK_N, BLOCK_M)
        logits, factor = _score(dots, bias[:, None], softmax_scale, softcap, HAS_SOFTCAP)
        if HAS_SOFT:
            head = batch * HEADS + head_in_batch
            threshold = load_thresholds(threshold_ptr, head, query_index, exists, seqlen_q, True)
            exponent, gate_factor, slope = soft_gate(
                score[:, None], threshold[None, :], contested_from[:, None], row[None, :]
            )
            logits += exponent
        weights = tl.exp2(logits - highest[None, :] - log_total[None, :])
        if HAS_SOFT:
            weights *= gate_factor
        if MASKED:
            visible = (birth[:, None] <= row[None, :]) & (row[None, :] < death[:, None])
            weights = tl.where(visible, weights, 0.0)
        dweights = tl.dot(value, tl.trans(dout), input_precision=PRECISION)
        if HAS_DROPOUT:
            keep_factor = keep_factors(
                seed, query_head[None, :], query_index[None, :], key_index[:, None], drop_limit, keep_scale
            )
            dweights *= keep_factor
            kept_weights = weights * keep_factor
        else:
            kept_weights = weights
        dvalue = tl.dot(kept_weights.to(dout.dtype), dout, dvalue, input_precision=PRECISION)
        dlogits = weights * (dweights - delta[None, :])
        dimportance += tl.sum(dlogits, axis=1)
        if HAS_SOFT:
            dscore += tl.sum(dlogits * slope, axis=1)
        dkey = tl.dot((dlogits * factor).to(query.dtype), query, dkey, input_precision=PRECISION)
    return dkey, dvalue, dimportance, dscore
