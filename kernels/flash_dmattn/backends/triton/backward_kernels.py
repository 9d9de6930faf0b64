"""Backward over the forward's key lists, in two kernels.

One program of the first holds a query tile and walks its keys: dquery. One program of the second holds a tile of an
epoch's key list and walks the queries that see it: dkey, dvalue and dimportance, summed over the group in registers and
added to memory once. A key stands in the list of every epoch that sees it, so these sums meet in memory: by atomic
additions, or, when they have to be reproducible, epoch after epoch.
"""

import torch
import triton
import triton.language as tl

from flash_dmattn.backends.triton.launch import Launch
from flash_dmattn.backends.triton.tiles import LOG2E, gather_rows, load_keys, query_rows, query_tile, tanh


def run_backward(
    launch: Launch, out: torch.Tensor, lse: torch.Tensor, dout: torch.Tensor, dlse: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Returns dquery, dkey, dvalue in their dtypes and dimportance float32, or None without importance."""
    call, lists, config = launch.call, launch.lists, launch.backward_config
    batch, seqlen_q, num_heads, head_dim = call.query.shape
    num_lists = lists.entries.shape[0]
    dout, dlse = dout.contiguous(), dlse.contiguous()
    delta = torch.empty_like(lse)
    rows = batch * seqlen_q * num_heads
    _delta[(triton.cdiv(rows, 32),)](
        out, dout, dlse, delta, rows, seqlen_q, num_heads, head_dim, BLOCK_D=launch.constants()["BLOCK_D"], BLOCK=32
    )
    options = {**launch.constants(), "num_warps": config.num_warps, "num_stages": config.num_stages}
    gradients = (dout, lse, delta)

    dquery = torch.empty_like(call.query, memory_format=torch.contiguous_format)
    forward = launch.forward_config
    _dquery[(lists.num_epochs * lists.tiles_per_epoch, num_lists)](
        dquery,
        *gradients,
        *launch.shared_arguments(),
        **launch.constants(),
        BLOCK_M=forward.block_m,
        BLOCK_N=min(forward.block_n, 64),
        num_warps=8 if forward.block_m >= 128 else forward.num_warps,
        num_stages=min(forward.num_stages, config.num_stages),
    )

    dkey = torch.zeros(call.key.shape, dtype=torch.float32, device=out.device)
    dvalue = torch.zeros_like(dkey)
    dimportance = torch.zeros(call.birth.shape, dtype=torch.float32, device=out.device)
    per_launch = 1 if call.deterministic else lists.num_epochs
    for first_epoch in range(0, lists.num_epochs, per_launch):
        _dkey_dvalue[(triton.cdiv(lists.capacity, config.block_n), per_launch, num_lists)](
            dkey,
            dvalue,
            dimportance,
            first_epoch,
            *gradients,
            *launch.shared_arguments(),
            **options,
            TILES=triton.next_power_of_2(lists.tiles_per_epoch),
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
        )
    return (
        dquery,
        dkey.to(call.key.dtype),
        dvalue.to(call.value.dtype),
        None if call.importance is None else dimportance,
    )


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
def _dquery(
    dquery_ptr,  # (B, Sq, H, D)
    dout_ptr,  # (B, Sq, H, D)
    lse_ptr,  # (B, H, Sq)
    delta_ptr,  # (B, H, Sq)
    query_ptr, key_ptr, value_ptr, importance_ptr, birth_ptr, death_ptr, start_ptr, positions_ptr,
    entries_ptr, sections_ptr, stretches_ptr, softmax_scale, softcap,
    query_batch_stride, query_row_stride, query_head_stride,
    key_batch_stride, key_row_stride, key_head_stride,
    value_batch_stride, value_row_stride, value_head_stride,
    seqlen_q, seqlen_k, num_epochs, capacity, tiles_per_epoch,
    HEADS: tl.constexpr, GROUP: tl.constexpr, HEADS_PER_KV: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, EPOCH: tl.constexpr, TILE: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, HAS_START: tl.constexpr, HAS_POSITIONS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    epoch = tl.program_id(0) // tiles_per_epoch
    tile = tl.program_id(0) % tiles_per_epoch
    head = tl.program_id(1)
    batch = head // HEADS
    head_in_batch = head % HEADS
    list_index = head.to(tl.int64) * num_epochs + epoch
    entries_ptr += list_index * capacity
    stretches_ptr += (list_index * tiles_per_epoch + tile) * 2
    begin = tl.load(stretches_ptr)
    end = tl.load(stretches_ptr + 1)
    num_dying = tl.load(sections_ptr + list_index * 3)
    num_alive = tl.load(sections_ptr + list_index * 3 + 1)
    birth_ptr += head.to(tl.int64) * seqlen_k
    death_ptr += head.to(tl.int64) * seqlen_k
    importance_ptr += head.to(tl.int64) * seqlen_k
    key_ptr += batch.to(tl.int64) * key_batch_stride + head_in_batch // HEADS_PER_KV * key_head_stride
    value_ptr += batch.to(tl.int64) * value_batch_stride + head_in_batch // HEADS_PER_KV * value_head_stride

    query_index, group_head, exists = query_tile(epoch, tile, seqlen_q, EPOCH, TILE, GROUP, BLOCK_M)
    row = query_rows(start_ptr, positions_ptr, batch, query_index, exists, seqlen_q, HAS_START, HAS_POSITIONS)
    query_head = head_in_batch * GROUP + group_head
    dim = tl.arange(0, BLOCK_D)
    address = query_ptr + batch.to(tl.int64) * query_batch_stride + query_index.to(tl.int64) * query_row_stride
    address = (address + query_head * query_head_stride)[:, None] + dim[None, :]
    is_query = exists[:, None] & (dim < HEAD_DIM)[None, :]
    num_heads = HEADS * GROUP
    out_row = (batch.to(tl.int64) * seqlen_q + query_index) * num_heads + query_head
    out_address = out_row[:, None] * HEAD_DIM + dim[None, :]
    lse_row = (batch * num_heads + query_head).to(tl.int64) * seqlen_q + query_index
    lse = tl.load(lse_ptr + lse_row, mask=exists, other=float("-inf"))
    sees_any = (row >= 0) & (lse > float("-inf"))
    lse = tl.where(sees_any, lse * LOG2E, float("inf"))
    # Rows that see nothing may hold anything; zeros keep it out of the sums.
    query = tl.load(address, mask=is_query & sees_any[:, None], other=0.0)
    dout = tl.load(dout_ptr + out_address, mask=is_query & sees_any[:, None], other=0.0)
    delta = tl.load(delta_ptr + lse_row, mask=exists & sees_any, other=0.0)

    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    first_full = begin + tl.cdiv(tl.maximum(num_dying - begin, 0), BLOCK_N) * BLOCK_N
    last_full = first_full + tl.maximum(num_alive - first_full, 0) // BLOCK_N * BLOCK_N
    acc = _dquery_run(
        acc, query, dout, lse, delta, row, begin, tl.minimum(first_full, end), end,
        key_ptr, value_ptr, importance_ptr, birth_ptr, death_ptr, entries_ptr, softmax_scale, softcap,
        key_row_stride, value_row_stride, HEAD_DIM, BLOCK_D, BLOCK_N, HAS_BIAS, HAS_SOFTCAP, PRECISION, True,
    )  # fmt: skip
    acc = _dquery_run(
        acc, query, dout, lse, delta, row, first_full, last_full, end,
        key_ptr, value_ptr, importance_ptr, birth_ptr, death_ptr, entries_ptr, softmax_scale, softcap,
        key_row_stride, value_row_stride, HEAD_DIM, BLOCK_D, BLOCK_N, HAS_BIAS, HAS_SOFTCAP, PRECISION, False,
    )  # fmt: skip
    acc = _dquery_run(
        acc, query, dout, lse, delta, row, last_full, end, end,
        key_ptr, value_ptr, importance_ptr, birth_ptr, death_ptr, entries_ptr, softmax_scale, softcap,
        key_row_stride, value_row_stride, HEAD_DIM, BLOCK_D, BLOCK_N, HAS_BIAS, HAS_SOFTCAP, PRECISION, True,
    )  # fmt: skip
    tl.store(dquery_ptr + out_address, acc.to(dquery_ptr.dtype.element_ty), mask=is_query)


@triton.jit
def _dquery_run(
    acc, query, dout, lse, delta, row, begin, stop, end,
    key_ptr, value_ptr, importance_ptr, birth_ptr, death_ptr, entries_ptr, softmax_scale, softcap,
    key_row_stride, value_row_stride,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Adds the share of the list's keys from `begin` up to `stop` to dquery; lanes past `end` do not count."""
    for offset in range(begin, stop, BLOCK_N):
        key_index, is_listed = load_keys(entries_ptr, offset, end, BLOCK_N, MASKED)
        key = gather_rows(key_ptr, key_index, key_row_stride, is_listed, HEAD_DIM, BLOCK_D, MASKED)
        value = gather_rows(value_ptr, key_index, value_row_stride, is_listed, HEAD_DIM, BLOCK_D, MASKED)
        dots = tl.dot(query, tl.trans(key), input_precision=PRECISION)
        bias = tl.load(importance_ptr + key_index)[None, :] * LOG2E if HAS_BIAS else 0.0
        logits, factor = _score(dots, bias, softmax_scale, softcap, HAS_SOFTCAP)
        weights = tl.exp2(logits - lse[:, None])
        if MASKED:
            birth = tl.load(birth_ptr + key_index)
            death = tl.load(death_ptr + key_index)
            is_visible = (birth[None, :] <= row[:, None]) & (row[:, None] < death[None, :]) & is_listed[None, :]
            weights = tl.where(is_visible, weights, 0.0)
        dweights = tl.dot(dout, tl.trans(value), input_precision=PRECISION)
        dscores = weights * (dweights - delta[:, None]) * factor
        acc = tl.dot(dscores.to(key.dtype), key, acc, input_precision=PRECISION)
    return acc


@triton.jit
def _dkey_dvalue(
    dkey_ptr,  # (B, Sk, Hkv, D) float32
    dvalue_ptr,  # (B, Sk, Hkv, D) float32
    dimportance_ptr,  # (B, Hi, Sk) float32
    first_epoch,
    dout_ptr,  # (B, Sq, H, D)
    lse_ptr,  # (B, H, Sq)
    delta_ptr,  # (B, H, Sq)
    query_ptr, key_ptr, value_ptr, importance_ptr, birth_ptr, death_ptr, start_ptr, positions_ptr,
    entries_ptr, sections_ptr, stretches_ptr, softmax_scale, softcap,
    query_batch_stride, query_row_stride, query_head_stride,
    key_batch_stride, key_row_stride, key_head_stride,
    value_batch_stride, value_row_stride, value_head_stride,
    seqlen_q, seqlen_k, num_epochs, capacity, tiles_per_epoch,
    HEADS: tl.constexpr, GROUP: tl.constexpr, HEADS_PER_KV: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, EPOCH: tl.constexpr, TILE: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, HAS_START: tl.constexpr, HAS_POSITIONS: tl.constexpr, PRECISION: tl.constexpr,
    TILES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    epoch = first_epoch + tl.program_id(1)
    head = tl.program_id(2)
    batch = head // HEADS
    head_in_batch = head % HEADS
    list_index = head.to(tl.int64) * num_epochs + epoch
    num_dying = tl.load(sections_ptr + list_index * 3)
    num_alive = tl.load(sections_ptr + list_index * 3 + 1)
    num_listed = tl.load(sections_ptr + list_index * 3 + 2)
    offset = tl.program_id(0) * BLOCK_N
    if offset < num_listed:
        birth_ptr += head.to(tl.int64) * seqlen_k
        death_ptr += head.to(tl.int64) * seqlen_k
        kv_head = head_in_batch // HEADS_PER_KV
        key_ptr += batch.to(tl.int64) * key_batch_stride + kv_head * key_head_stride
        value_ptr += batch.to(tl.int64) * value_batch_stride + kv_head * value_head_stride
        key_index, is_listed = load_keys(entries_ptr + list_index * capacity, offset, num_listed, BLOCK_N, True)
        key = gather_rows(key_ptr, key_index, key_row_stride, is_listed, HEAD_DIM, BLOCK_D, True)
        value = gather_rows(value_ptr, key_index, value_row_stride, is_listed, HEAD_DIM, BLOCK_D, True)
        birth = tl.load(birth_ptr + key_index, mask=is_listed, other=2147483647)
        death = tl.load(death_ptr + key_index, mask=is_listed, other=-1)
        importance_place = head.to(tl.int64) * seqlen_k + key_index
        if HAS_BIAS:
            bias = tl.load(importance_ptr + importance_place, mask=is_listed, other=0.0) * LOG2E
        else:
            bias = tl.zeros((BLOCK_N,), tl.float32)

        # The query tiles whose stretch meets this tile are a run, because begin and end only grow.
        tile = tl.arange(0, TILES)
        stretches = stretches_ptr + (list_index * tiles_per_epoch + tile) * 2
        begin = tl.load(stretches, mask=tile < tiles_per_epoch, other=2147483647)
        end = tl.load(stretches + 1, mask=tile < tiles_per_epoch, other=0)
        meets = (begin < offset + BLOCK_N) & (end > offset)
        first_token = tl.min(tl.where(meets, tile, TILES), axis=0) * TILE
        last_token = tl.minimum((tl.max(tl.where(meets, tile, -1), axis=0) + 1) * TILE, EPOCH)
        is_full = (offset >= num_dying) & (offset + BLOCK_N <= num_alive)

        dkey = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
        dvalue = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
        dimportance = tl.zeros((BLOCK_N,), tl.float32)
        if is_full:
            dkey, dvalue, dimportance = _dkey_dvalue_run(
                dkey, dvalue, dimportance, key, value, bias, birth, death, epoch, first_token, last_token,
                batch, head_in_batch, query_ptr, dout_ptr, lse_ptr, delta_ptr, start_ptr, positions_ptr,
                softmax_scale, softcap, query_batch_stride, query_row_stride, query_head_stride, seqlen_q,
                HEADS, GROUP, HEAD_DIM, BLOCK_D, EPOCH, BLOCK_M, HAS_SOFTCAP, HAS_START, HAS_POSITIONS, PRECISION,
                False,
            )  # fmt: skip
        else:
            dkey, dvalue, dimportance = _dkey_dvalue_run(
                dkey, dvalue, dimportance, key, value, bias, birth, death, epoch, first_token, last_token,
                batch, head_in_batch, query_ptr, dout_ptr, lse_ptr, delta_ptr, start_ptr, positions_ptr,
                softmax_scale, softcap, query_batch_stride, query_row_stride, query_head_stride, seqlen_q,
                HEADS, GROUP, HEAD_DIM, BLOCK_D, EPOCH, BLOCK_M, HAS_SOFTCAP, HAS_START, HAS_POSITIONS, PRECISION,
                True,
            )  # fmt: skip

        dim = tl.arange(0, BLOCK_D)
        num_kv_heads = HEADS // HEADS_PER_KV
        place = (batch.to(tl.int64) * seqlen_k + key_index) * num_kv_heads + kv_head
        place = place[:, None] * HEAD_DIM + dim[None, :]
        mask = is_listed[:, None] & (dim < HEAD_DIM)[None, :]
        tl.atomic_add(dkey_ptr + place, dkey, mask=mask, sem="relaxed")
        tl.atomic_add(dvalue_ptr + place, dvalue, mask=mask, sem="relaxed")
        if HAS_BIAS:
            tl.atomic_add(dimportance_ptr + importance_place, dimportance, mask=is_listed, sem="relaxed")


@triton.jit
def _dkey_dvalue_run(
    dkey, dvalue, dimportance, key, value, bias, birth, death, epoch, first_token, last_token,
    batch, head_in_batch, query_ptr, dout_ptr, lse_ptr, delta_ptr, start_ptr, positions_ptr,
    softmax_scale, softcap, query_batch_stride, query_row_stride, query_head_stride, seqlen_q,
    HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, EPOCH: tl.constexpr,
    BLOCK_M: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_START: tl.constexpr, HAS_POSITIONS: tl.constexpr,
    PRECISION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Adds the share of the epoch's tokens from first_token up to last_token to the gradients of a key tile."""
    dim = tl.arange(0, BLOCK_D)
    num_heads = HEADS * GROUP
    for lane in range(first_token * GROUP, last_token * GROUP, BLOCK_M):
        # Rows are tokens x group heads, counted through, so that every tile is full.
        flat = lane + tl.arange(0, BLOCK_M)
        query_index = epoch * EPOCH + flat // GROUP
        query_head = head_in_batch * GROUP + flat % GROUP
        exists = (flat < last_token * GROUP) & (query_index < seqlen_q)
        row = query_rows(start_ptr, positions_ptr, batch, query_index, exists, seqlen_q, HAS_START, HAS_POSITIONS)
        lse_row = (batch * num_heads + query_head).to(tl.int64) * seqlen_q + query_index
        lse = tl.load(lse_ptr + lse_row, mask=exists, other=float("-inf"))
        sees_any = (row >= 0) & (lse > float("-inf"))
        is_query = sees_any[:, None] & (dim < HEAD_DIM)[None, :]
        lse = tl.where(sees_any, lse * LOG2E, float("inf"))
        delta = tl.load(delta_ptr + lse_row, mask=sees_any, other=0.0)
        address = query_ptr + batch.to(tl.int64) * query_batch_stride + query_index.to(tl.int64) * query_row_stride
        address = (address + query_head * query_head_stride)[:, None] + dim[None, :]
        query = tl.load(address, mask=is_query, other=0.0)
        out_row = (batch.to(tl.int64) * seqlen_q + query_index) * num_heads + query_head
        dout = tl.load(dout_ptr + out_row[:, None] * HEAD_DIM + dim[None, :], mask=is_query, other=0.0)

        dots = tl.dot(key, tl.trans(query), input_precision=PRECISION)  # (BLOCK_N, BLOCK_M)
        logits, factor = _score(dots, bias[:, None], softmax_scale, softcap, HAS_SOFTCAP)
        weights = tl.exp2(logits - lse[None, :])
        if MASKED:
            is_visible = (birth[:, None] <= row[None, :]) & (row[None, :] < death[:, None])
            weights = tl.where(is_visible, weights, 0.0)
        dvalue = tl.dot(weights.to(dout.dtype), dout, dvalue, input_precision=PRECISION)
        dweights = tl.dot(value, tl.trans(dout), input_precision=PRECISION)
        dlogits = weights * (dweights - delta[None, :])
        dimportance += tl.sum(dlogits, axis=1)
        dkey = tl.dot((dlogits * factor).to(query.dtype), query, dkey, input_precision=PRECISION)
    return dkey, dvalue, dimportance
