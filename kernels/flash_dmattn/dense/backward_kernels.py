"""Backward under a mask and a bias, in two kernels, without atomic additions to dquery, dkey and dvalue.

One program of the first holds a tile of query rows of a head and walks its key tiles: dquery. One program of the second
holds a key tile of a kv head and walks the query tiles that see it, for each of them the heads of the group: dkey and
dvalue, and dbias, summed over the group where it shares a bias.
"""

import torch
import triton
import triton.language as tl

from flash_dmattn.backends.triton.backward_kernels import _delta, _load_row_stats, _score
from flash_dmattn.backends.triton.configs import BlockConfig
from flash_dmattn.backends.triton.tiles import gather_rows
from flash_dmattn.calls import DenseCall
from flash_dmattn.dense.bias_gradient import BiasGradient
from flash_dmattn.dense.configs import dkey_config, dquery_config, grains
from flash_dmattn.dense.forward_kernels import shared_head, split_lane
from flash_dmattn.dense.launch import constants, shared_arguments
from flash_dmattn.dense.tiles import classify_tiles, list_tiles, list_transposed_tiles, load_bias, load_visible


def run_backward(
    call: DenseCall,
    out: torch.Tensor,
    stats: torch.Tensor,
    dout: torch.Tensor,
    dlse: torch.Tensor,
    needs_dbias: bool,
    dquery_blocks: BlockConfig | None = None,
    dkey_blocks: BlockConfig | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Returns dquery, dkey, dvalue and, when needed, dbias, in their dtypes and shapes."""
    batch, seqlen_q, num_heads, head_dim = call.query.shape
    num_kv_heads = call.key.shape[2]
    dout, dlse = dout.contiguous(), dlse.contiguous()
    delta = torch.empty_like(dlse)
    numbers = constants(call)
    _delta[(triton.cdiv(batch * seqlen_q * num_heads, 32),)](
        out,
        dout,
        dlse,
        delta,
        batch * seqlen_q * num_heads,
        seqlen_q,
        num_heads,
        head_dim,
        BLOCK_D=numbers["BLOCK_D"],
        BLOCK=32,
    )
    arguments = (dout, stats, delta, *shared_arguments(call))
    grain_m, grain_n = grains(call.query)
    classes = classify_tiles(call, grain_m, grain_n)

    config = dquery_blocks or dquery_config(call.query)
    lists = list_tiles(classes, config.block_m // grain_m, config.block_n // grain_n)
    rows, columns = lists.order.shape[2:]
    dquery = torch.empty_like(call.query, memory_format=torch.contiguous_format)
    _dquery[(rows * call.group_size, batch * num_kv_heads)](
        dquery,
        *arguments,
        lists.order,
        lists.counts,
        rows,
        columns,
        **numbers,
        **_blocks(config),
    )

    config = dkey_blocks or dkey_config(call.query)
    lists = list_transposed_tiles(classes, num_kv_heads, config.block_n // grain_n, config.block_m // grain_m)
    rows, columns = lists.order.shape[2:]
    dkey, dvalue = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (call.key, call.value))
    dbias = BiasGradient(call, needs_dbias)
    _dkey_dvalue[(rows, batch * num_kv_heads)](
        dkey,
        dvalue,
        *dbias.arguments(),
        *arguments,
        lists.order,
        lists.counts,
        rows,
        columns,
        **numbers,
        LIST_HEADS=lists.order.shape[1],
        DBIAS_HEADS=dbias.num_heads,
        DBIAS=dbias.mode,
        **_blocks(config),
    )
    return dquery, dkey, dvalue, dbias.result(stats, dlse) if needs_dbias else None


def _blocks(config: BlockConfig) -> dict:
    return {
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }


@triton.jit
def _dquery(
    dquery_ptr,  # (B, Sq, H, D)
    dout_ptr,  # (B, Sq, H, D)
    stats_ptr,  # (2, B, H, Sq)
    delta_ptr,  # (B, H, Sq)
    query_ptr, key_ptr, value_ptr,
    mask_ptr, mask_batch_stride, mask_head_stride, mask_row_stride, mask_key_stride,
    bias_ptr, bias_batch_stride, bias_head_stride, bias_row_stride, bias_key_stride,
    softmax_scale, softcap,
    query_batch_stride, query_row_stride, query_head_stride,
    key_batch_stride, key_row_stride, key_head_stride,
    value_batch_stride, value_row_stride, value_head_stride,
    seqlen_q, seqlen_k, order_ptr, counts_ptr, rows, columns,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, MASK_BATCHES: tl.constexpr, MASK_HEADS: tl.constexpr,
    BIAS_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, HAS_MASK: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, IS_CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
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
    place = (batch * (KV_HEADS * GROUP) + head) * seqlen_q + row
    num_stats = tl.num_programs(1).to(tl.int64) * GROUP * seqlen_q
    highest, log_total, delta, sees_any = _load_row_stats(stats_ptr, delta_ptr, place, exists, num_stats)
    query = gather_rows(
        query_ptr + batch * query_batch_stride + head * query_head_stride, row, query_row_stride, sees_any,
        HEAD_DIM, BLOCK_D, True,
    )  # fmt: skip
    out_stride = KV_HEADS * GROUP * HEAD_DIM
    out_offset = batch * seqlen_q * out_stride + head * HEAD_DIM
    dout = gather_rows(dout_ptr + out_offset, row, out_stride, sees_any, HEAD_DIM, BLOCK_D, True)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    acc = _dquery_run(
        acc, query, dout, highest, log_total, delta, row, 0, num_full, order_ptr, key_ptr, value_ptr,
        mask_ptr, mask_row_stride, mask_key_stride, bias_ptr, bias_row_stride, bias_key_stride,
        softmax_scale, softcap, key_row_stride, value_row_stride, seqlen_q, seqlen_k,
        HEAD_DIM, BLOCK_D, BLOCK_N, HAS_MASK, HAS_BIAS, HAS_SOFTCAP, IS_CAUSAL, PRECISION, False,
    )  # fmt: skip
    acc = _dquery_run(
        acc, query, dout, highest, log_total, delta, row, num_full, num_listed, order_ptr, key_ptr, value_ptr,
        mask_ptr, mask_row_stride, mask_key_stride, bias_ptr, bias_row_stride, bias_key_stride,
        softmax_scale, softcap, key_row_stride, value_row_stride, seqlen_q, seqlen_k,
        HEAD_DIM, BLOCK_D, BLOCK_N, HAS_MASK, HAS_BIAS, HAS_SOFTCAP, IS_CAUSAL, PRECISION, True,
    )  # fmt: skip
    dim = tl.arange(0, BLOCK_D)
    address = dquery_ptr + out_offset + row.to(tl.int64)[:, None] * out_stride + dim[None, :]
    tl.store(address, acc.to(dquery_ptr.dtype.element_ty), mask=exists[:, None] & (dim < HEAD_DIM)[None, :])


@triton.jit
def _dquery_run(
    acc, query, dout, highest, log_total, delta, row, first, last, order_ptr, key_ptr, value_ptr,
    mask_ptr, mask_row_stride, mask_key_stride, bias_ptr, bias_row_stride, bias_key_stride,
    softmax_scale, softcap, key_row_stride, value_row_stride, seqlen_q, seqlen_k,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, HAS_MASK: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, IS_CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """Adds the share of the listed key tiles from `first` up to `last` to dquery."""
    for place in range(first, last):
        key_index = tl.load(order_ptr + place) * BLOCK_N + tl.arange(0, BLOCK_N)
        counts = key_index < seqlen_k
        key = gather_rows(key_ptr, key_index, key_row_stride, counts, HEAD_DIM, BLOCK_D, MASKED)
        value = gather_rows(value_ptr, key_index, value_row_stride, counts, HEAD_DIM, BLOCK_D, MASKED)
        dots = tl.dot(query, tl.trans(key), input_precision=PRECISION)
        bias = 0.0
        if HAS_BIAS:
            bias = load_bias(bias_ptr, bias_row_stride, bias_key_stride, row, key_index, seqlen_q, seqlen_k)
        logits, factor = _score(dots, bias, softmax_scale, softcap, HAS_SOFTCAP)
        weights = tl.exp2(logits - highest[:, None] - log_total[:, None])
        if MASKED:
            visible = load_visible(
                mask_ptr, mask_row_stride, mask_key_stride, row, key_index, seqlen_q, seqlen_k, HAS_MASK, IS_CAUSAL
            )
            weights = tl.where(visible, weights, 0.0)
        dweights = tl.dot(dout, tl.trans(value), input_precision=PRECISION)
        dscores = weights * (dweights - delta[:, None]) * factor
        acc = tl.dot(dscores.to(key.dtype), key, acc, input_precision=PRECISION)
    return acc


@triton.jit
def _dkey_dvalue(
    dkey_ptr,  # (B, Sk, Hkv, D)
    dvalue_ptr,  # (B, Sk, Hkv, D)
    dbias_ptr,  # as `BiasGradient` says
    dbias_batch_stride, dbias_head_stride, dbias_row_stride,
    dout_ptr,  # (B, Sq, H, D)
    stats_ptr,  # (2, B, H, Sq)
    delta_ptr,  # (B, H, Sq)
    query_ptr, key_ptr, value_ptr,
    mask_ptr, mask_batch_stride, mask_head_stride, mask_row_stride, mask_key_stride,
    bias_ptr, bias_batch_stride, bias_head_stride, bias_row_stride, bias_key_stride,
    softmax_scale, softcap,
    query_batch_stride, query_row_stride, query_head_stride,
    key_batch_stride, key_row_stride, key_head_stride,
    value_batch_stride, value_row_stride, value_head_stride,
    seqlen_q, seqlen_k, order_ptr, counts_ptr, rows, columns,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, MASK_BATCHES: tl.constexpr, MASK_HEADS: tl.constexpr,
    BIAS_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, HAS_MASK: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, IS_CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
    LIST_HEADS: tl.constexpr, DBIAS_HEADS: tl.constexpr, DBIAS: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    batch, first_head, kv_head = split_lane(tl.program_id(1), 0, KV_HEADS, GROUP)
    key_ptr += batch * key_batch_stride + kv_head * key_head_stride
    value_ptr += batch * value_batch_stride + kv_head * value_head_stride
    mask_ptr += batch * mask_batch_stride
    bias_ptr += batch * bias_batch_stride
    dbias_ptr += batch * dbias_batch_stride
    query_ptr += batch * query_batch_stride
    list_batch = batch if MASK_BATCHES > 1 else batch * 0
    list_row = (list_batch * LIST_HEADS + shared_head(kv_head, KV_HEADS, LIST_HEADS)) * rows + tile
    order_ptr += list_row * columns
    num_full = tl.load(counts_ptr + list_row * 2)
    num_listed = tl.load(counts_ptr + list_row * 2 + 1)

    key_index = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    counts = key_index < seqlen_k
    key = gather_rows(key_ptr, key_index, key_row_stride, counts, HEAD_DIM, BLOCK_D, True)
    value = gather_rows(value_ptr, key_index, value_row_stride, counts, HEAD_DIM, BLOCK_D, True)
    dkey = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dvalue = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dkey, dvalue = _dkey_dvalue_run(
        dkey, dvalue, key, value, key_index, counts, 0, num_full, order_ptr, batch, first_head,
        dbias_ptr, dbias_head_stride, dbias_row_stride, query_ptr, dout_ptr, stats_ptr, delta_ptr,
        mask_ptr, mask_head_stride, mask_row_stride, mask_key_stride,
        bias_ptr, bias_head_stride, bias_row_stride, bias_key_stride,
        softmax_scale, softcap, query_row_stride, query_head_stride, seqlen_q, seqlen_k,
        KV_HEADS, GROUP, MASK_HEADS, BIAS_HEADS, HEAD_DIM, BLOCK_D, HAS_MASK, HAS_BIAS, HAS_SOFTCAP, IS_CAUSAL,
        PRECISION, DBIAS_HEADS, DBIAS, BLOCK_M, BLOCK_N, False,
    )  # fmt: skip
    dkey, dvalue = _dkey_dvalue_run(
        dkey, dvalue, key, value, key_index, counts, num_full, num_listed, order_ptr, batch, first_head,
        dbias_ptr, dbias_head_stride, dbias_row_stride, query_ptr, dout_ptr, stats_ptr, delta_ptr,
        mask_ptr, mask_head_stride, mask_row_stride, mask_key_stride,
        bias_ptr, bias_head_stride, bias_row_stride, bias_key_stride,
        softmax_scale, softcap, query_row_stride, query_head_stride, seqlen_q, seqlen_k,
        KV_HEADS, GROUP, MASK_HEADS, BIAS_HEADS, HEAD_DIM, BLOCK_D, HAS_MASK, HAS_BIAS, HAS_SOFTCAP, IS_CAUSAL,
        PRECISION, DBIAS_HEADS, DBIAS, BLOCK_M, BLOCK_N, True,
    )  # fmt: skip
    dim = tl.arange(0, BLOCK_D)
    place = ((batch * seqlen_k + key_index) * KV_HEADS + kv_head)[:, None] * HEAD_DIM + dim[None, :]
    mask = counts[:, None] & (dim < HEAD_DIM)[None, :]
    tl.store(dkey_ptr + place, dkey.to(dkey_ptr.dtype.element_ty), mask=mask)
    tl.store(dvalue_ptr + place, dvalue.to(dvalue_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _dkey_dvalue_run(
    dkey, dvalue, key, value, key_index, counts, first, last, order_ptr, batch, first_head,
    dbias_ptr, dbias_head_stride, dbias_row_stride, query_ptr, dout_ptr, stats_ptr, delta_ptr,
    mask_ptr, mask_head_stride, mask_row_stride, mask_key_stride,
    bias_ptr, bias_head_stride, bias_row_stride, bias_key_stride,
    softmax_scale, softcap, query_row_stride, query_head_stride, seqlen_q, seqlen_k,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, MASK_HEADS: tl.constexpr, BIAS_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, HAS_MASK: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, IS_CAUSAL: tl.constexpr, PRECISION: tl.constexpr, DBIAS_HEADS: tl.constexpr,
    DBIAS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Adds the share of the listed query tiles from `first` up to `last`, all heads of the group, to the gradients."""
    HEADS: tl.constexpr = KV_HEADS * GROUP
    # Heads that share a bias add up in registers before dbias is written.
    SHARES: tl.constexpr = (DBIAS == "store" or DBIAS == "add") and GROUP > 1 and DBIAS_HEADS < HEADS
    num_stats = tl.num_programs(1).to(tl.int64) * GROUP * seqlen_q
    out_stride = HEADS * HEAD_DIM
    dbias = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for step in range(first * GROUP, last * GROUP):
        head = first_head + step % GROUP
        row = tl.load(order_ptr + step // GROUP) * BLOCK_M + tl.arange(0, BLOCK_M)
        exists = row < seqlen_q
        place = (batch * HEADS + head) * seqlen_q + row
        highest, log_total, delta, sees_any = _load_row_stats(stats_ptr, delta_ptr, place, exists, num_stats)
        query = gather_rows(
            query_ptr + head * query_head_stride, row, query_row_stride, sees_any, HEAD_DIM, BLOCK_D, True
        )
        out_offset = batch * seqlen_q * out_stride + head * HEAD_DIM
        dout = gather_rows(dout_ptr + out_offset, row, out_stride, sees_any, HEAD_DIM, BLOCK_D, True)
        dots = tl.dot(key, tl.trans(query), input_precision=PRECISION)  # (BLOCK_N, BLOCK_M)
        bias = 0.0
        if HAS_BIAS:
            bias_head = shared_head(head, HEADS, BIAS_HEADS)
            bias = tl.trans(
                load_bias(
                    bias_ptr + bias_head * bias_head_stride, bias_row_stride, bias_key_stride,
                    row, key_index, seqlen_q, seqlen_k,
                )
            )  # fmt: skip
        logits, factor = _score(dots, bias, softmax_scale, softcap, HAS_SOFTCAP)
        weights = tl.exp2(logits - highest[None, :] - log_total[None, :])
        if MASKED:
            mask_head = shared_head(head, HEADS, MASK_HEADS)
            visible = load_visible(
                mask_ptr + mask_head * mask_head_stride, mask_row_stride, mask_key_stride,
                row, key_index, seqlen_q, seqlen_k, HAS_MASK, IS_CAUSAL,
            )  # fmt: skip
            weights = tl.where(tl.trans(visible), weights, 0.0)
        dvalue = tl.dot(weights.to(dout.dtype), dout, dvalue, input_precision=PRECISION)
        dweights = tl.dot(value, tl.trans(dout), input_precision=PRECISION)
        dlogits = weights * (dweights - delta[None, :])
        dkey = tl.dot((dlogits * factor).to(query.dtype), query, dkey, input_precision=PRECISION)
        if DBIAS == "column":
            place = dbias_ptr + shared_head(head, HEADS, DBIAS_HEADS) * dbias_head_stride + key_index
            tl.atomic_add(place, tl.sum(dlogits, axis=1), mask=counts, sem="relaxed")
        elif SHARES:
            dbias = tl.where(step % GROUP == 0, 0.0, dbias) + dlogits
            if step % GROUP == GROUP - 1:
                _write_dbias(
                    dbias, dbias_ptr + shared_head(head, HEADS, DBIAS_HEADS) * dbias_head_stride, dbias_row_stride,
                    row, exists, key_index, counts, DBIAS,
                )  # fmt: skip
        elif DBIAS != "none":
            _write_dbias(
                dlogits, dbias_ptr + shared_head(head, HEADS, DBIAS_HEADS) * dbias_head_stride, dbias_row_stride,
                row, exists, key_index, counts, DBIAS,
            )  # fmt: skip
    return dkey, dvalue


@triton.jit
def _write_dbias(dbias, dbias_ptr, dbias_row_stride, row, exists, key_index, counts, DBIAS: tl.constexpr):
    """Stores, or adds, a (keys, rows) tile of dbias."""
    address = dbias_ptr + row.to(tl.int64)[:, None] * dbias_row_stride + key_index[None, :]
    mask = exists[:, None] & counts[None, :]
    if DBIAS == "store":
        tl.store(address, tl.trans(dbias).to(dbias_ptr.dtype.element_ty), mask=mask)
    else:
        tl.atomic_add(address, tl.trans(dbias), mask=mask, sem="relaxed")
