"""Which tiles of a mask have to be looked at: each is empty, partial or full, found in one pass over the mask."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from flash_dmattn.calls import DenseCall


@dataclass(frozen=True)
class TileLists:
    """For every row of tiles, the tiles of it that are not empty, full ones first.

    order: (Bm, Hl, rows, columns) int32, tile numbers of a row, full ones, then partial ones.
    counts: (Bm, Hl, rows, 2) int32, how many are full, and how many are not empty.
    """

    order: torch.Tensor
    counts: torch.Tensor


def classify_tiles(call: DenseCall, grain_m: int, grain_n: int) -> torch.Tensor:
    """Returns (Bm, Hm, cdiv(Sq, grain_m), cdiv(Sk, grain_n)) uint8: 0 for an empty tile, 1 a partial, 2 a full one.

    Keys beyond Sk are hidden; rows beyond Sq do not count. Bm and Hm are those of the mask, 1 and 1 without one.
    Raises ValueError when the call brings tiles of another shape.
    """
    mask = call.attn_mask
    seqlen_q, seqlen_k = call.query.shape[1], call.key.shape[1]
    batch, heads = (1, 1) if mask is None else mask.shape[:2]
    shape = (batch, heads, triton.cdiv(seqlen_q, grain_m), triton.cdiv(seqlen_k, grain_n))
    if call.tiles is not None:
        if call.tiles.shape != shape:
            raise ValueError(
                f"attn_mask must be tiled for a query of this dtype, head dim and length: its tiles must have shape "
                f"{shape}, got {tuple(call.tiles.shape)}"
            )
        return call.tiles
    classes = torch.empty(shape, dtype=torch.uint8, device=call.query.device)
    span = 128 // grain_n  # whole cache lines of a mask of bytes
    words = None if mask is None else _words(mask)
    _classify[(triton.cdiv(shape[3], span), shape[2], batch * heads)](
        classes,
        *(mask_arguments(call) if words is None else tensor_arguments(words, call)),
        heads,
        seqlen_q,
        seqlen_k,
        shape[3],
        HAS_MASK=mask is not None,
        HAS_WORDS=words is not None,
        IS_CAUSAL=call.is_causal,
        GRAIN_M=grain_m,
        GRAIN_N=grain_n,
        SPAN=span,
    )
    return classes


def list_tiles(classes: torch.Tensor, rows: int, columns: int) -> TileLists:
    """Returns, for tiles of `rows` x `columns` of the classified ones, those of keys that each row of tiles visits."""
    batch, heads, grain_rows, grain_columns = classes.shape
    shape = (batch, heads, triton.cdiv(grain_rows, rows), triton.cdiv(grain_columns, columns))
    return _list(classes, shape, classes.stride(), rows, columns, merged_heads=1, are_rows_keys=False)


def list_transposed_tiles(classes: torch.Tensor, num_kv_heads: int, rows: int, columns: int) -> TileLists:
    """Returns, for tiles of `rows` grains of keys x `columns` of queries, those of queries that see each row of tiles.

    The heads of a group share a list: a tile is empty or full there when it is so for all of them.
    """
    batch, heads, grain_columns, grain_rows = classes.shape
    merged = triton.cdiv(heads, num_kv_heads)
    shape = (batch, heads // merged, triton.cdiv(grain_rows, rows), triton.cdiv(grain_columns, columns))
    strides = classes.transpose(-1, -2).stride()
    return _list(classes, shape, strides, rows, columns, merged, are_rows_keys=True)


def _list(classes, shape, strides, rows, columns, merged_heads, are_rows_keys) -> TileLists:
    order = torch.empty(shape, dtype=torch.int32, device=classes.device)
    counts = torch.empty(*shape[:3], 2, dtype=torch.int32, device=classes.device)
    grain_rows, grain_columns = classes.shape[2:][:: -1 if are_rows_keys else 1]
    _list_tiles[(shape[2], shape[0] * shape[1])](
        order,
        counts,
        classes,
        *strides,
        shape[1],
        grain_rows,
        grain_columns,
        shape[3],
        HEADS=merged_heads,
        ROWS=rows,
        COLUMNS=columns,
        ARE_ROWS_KEYS=are_rows_keys,
        BLOCK=min(1024, max(16, triton.next_power_of_2(shape[3]))),
    )
    return TileLists(order, counts)


def mask_arguments(call: DenseCall) -> tuple:
    """Returns the mask's address and its four strides, 0 where it is broadcast."""
    return tensor_arguments(call.attn_mask, call)


def tensor_arguments(tensor: torch.Tensor | None, call: DenseCall) -> tuple:
    """Returns a mask's or bias' address and its four strides, 0 where it is broadcast."""
    if tensor is None:
        return (call.query, 0, 0, 0, 0)
    view = tensor.view(torch.uint8) if tensor.dtype == torch.bool else tensor
    strides = (stride if size > 1 else 0 for stride, size in zip(tensor.stride(), tensor.shape, strict=True))
    return (view, *strides)


def _words(mask: torch.Tensor) -> torch.Tensor | None:
    """Returns a mask of bytes as int32, four keys a word, or None where its layout has no whole words."""
    strides = (mask.storage_offset(), mask.data_ptr(), *mask.stride()[:3], mask.shape[3])
    is_whole = mask.dtype == torch.bool and mask.stride(3) == 1 and all(stride % 4 == 0 for stride in strides)
    return mask.view(torch.uint8).view(torch.int32) if is_whole else None


@triton.jit
def _classify(
    classes_ptr,  # (Bm, Hm, rows, columns) uint8
    mask_ptr,  # (Bm, Hm, Sq, Sk), HAS_WORDS: (Bm, Hm, Sq, Sk / 4) words of four bytes, 0 or 1 each
    mask_batch_stride,
    mask_head_stride,
    mask_row_stride,
    mask_key_stride,
    heads,
    seqlen_q,
    seqlen_k,
    columns,
    HAS_MASK: tl.constexpr,
    HAS_WORDS: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    GRAIN_M: tl.constexpr,
    GRAIN_N: tl.constexpr,
    SPAN: tl.constexpr,
):
    lane = tl.program_id(2)
    first_row, first_column = tl.program_id(1) * GRAIN_M, tl.program_id(0) * SPAN
    num_rows = tl.minimum(GRAIN_M, seqlen_q - first_row)
    mask_ptr += (lane // heads).to(tl.int64) * mask_batch_stride + (lane % heads).to(tl.int64) * mask_head_stride
    offset = seqlen_k - seqlen_q
    count = tl.zeros((SPAN,), tl.int32)
    last_visible = first_row + num_rows - 1 + offset if IS_CAUSAL else seqlen_k
    if first_column * GRAIN_N <= last_visible:
        row = first_row + tl.arange(0, GRAIN_M)
        if HAS_WORDS:
            word = first_column * (GRAIN_N // 4) + tl.arange(0, SPAN * GRAIN_N // 4)
            address = mask_ptr + row.to(tl.int64)[:, None] * mask_row_stride + word.to(tl.int64)[None, :]
            found = tl.load(address, mask=(row < seqlen_q)[:, None] & (word < seqlen_k // 4)[None, :], other=0)
            if IS_CAUSAL:
                past = row[:, None] + (offset + 1) - 4 * word[None, :]  # keys of the word that the row may see
                inside = found & (0x01010101 >> (32 - 8 * tl.minimum(tl.maximum(past, 1), 4)))
                found = tl.where(past > 0, inside, 0)
            counters = tl.sum(found, axis=0)  # four counters of 8 bits, below GRAIN_M + 1 each
            by_word = (counters & 255) + (counters >> 8 & 255) + (counters >> 16 & 255) + (counters >> 24 & 255)
            count = tl.sum(tl.reshape(by_word, (SPAN, GRAIN_N // 4)), axis=1)
        else:
            key = first_column * GRAIN_N + tl.arange(0, SPAN * GRAIN_N)
            visible = load_visible(
                mask_ptr, mask_row_stride, mask_key_stride, row, key, seqlen_q, seqlen_k, HAS_MASK, IS_CAUSAL
            )
            by_key = tl.sum((visible & (row < seqlen_q)[:, None]).to(tl.int32), axis=0)
            count = tl.sum(tl.reshape(by_key, (SPAN, GRAIN_N)), axis=1)
    column = first_column + tl.arange(0, SPAN)
    place = (lane.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)) * columns + column
    found = (count > 0).to(tl.uint8) + (count == num_rows * GRAIN_N).to(tl.uint8)
    tl.store(classes_ptr + place, found, mask=column < columns)


@triton.jit
def _list_tiles(
    order_ptr,  # (Bm, Hl, rows, columns)
    counts_ptr,  # (Bm, Hl, rows, 2)
    classes_ptr,  # (Bm, Hl * HEADS, rows * ROWS, columns * COLUMNS), up to the edge
    batch_stride,
    head_stride,
    row_stride,
    column_stride,
    heads,
    grain_rows,
    grain_columns,
    columns,
    HEADS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ARE_ROWS_KEYS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    lane = tl.program_id(1)
    tile_row = tl.program_id(0)
    classes_ptr += (lane // heads).to(tl.int64) * batch_stride + (lane % heads).to(tl.int64) * HEADS * head_stride
    list_row = lane.to(tl.int64) * tl.num_programs(0) + tile_row
    order_ptr += list_row * columns
    num_full = tl.zeros((), tl.int32)
    num_partial = tl.zeros((), tl.int32)
    for write in tl.static_range(2):  # full ones are counted before any is written
        first_partial = num_full
        num_full = tl.zeros((), tl.int32)
        num_partial = tl.zeros((), tl.int32)
        for start in range(0, columns, BLOCK):
            column = start + tl.arange(0, BLOCK)
            least = tl.full((BLOCK,), 2, tl.int32)
            most = tl.zeros((BLOCK,), tl.int32)
            for head in tl.static_range(HEADS):
                for i in tl.static_range(ROWS):
                    for j in tl.static_range(COLUMNS):
                        row = tile_row * ROWS + i
                        place = column * COLUMNS + j
                        exists = column < columns
                        # Keys beyond the edge are hidden, queries beyond it do not count: the last one counts twice.
                        if ARE_ROWS_KEYS:
                            place = tl.minimum(place, grain_columns - 1)
                            exists = exists & (row < grain_rows)
                        else:
                            row = tl.minimum(row, grain_rows - 1)
                            exists = exists & (place < grain_columns)
                        address = classes_ptr + head * head_stride + row * row_stride + place * column_stride
                        found = tl.load(address, mask=exists, other=0).to(tl.int32)
                        least = tl.minimum(least, found)
                        most = tl.maximum(most, found)
            is_full = (least == 2).to(tl.int32)
            is_partial = (most > 0).to(tl.int32) - is_full
            if write == 1:
                place = num_full + tl.cumsum(is_full, axis=0) - 1
                tl.store(order_ptr + place, column, mask=is_full > 0)
                place = first_partial + num_partial + tl.cumsum(is_partial, axis=0) - 1
                tl.store(order_ptr + place, column, mask=is_partial > 0)
            num_full += tl.sum(is_full, axis=0)
            num_partial += tl.sum(is_partial, axis=0)
    tl.store(counts_ptr + list_row * 2, num_full)
    tl.store(counts_ptr + list_row * 2 + 1, num_full + num_partial)


@triton.jit
def load_visible(
    mask_ptr, mask_row_stride, mask_key_stride, row, key, seqlen_q, seqlen_k,
    HAS_MASK: tl.constexpr, IS_CAUSAL: tl.constexpr,
):  # fmt: skip
    """Returns (rows, keys) what the rows see. A row beyond Sq sees what the last one may see."""
    counts = key < seqlen_k
    row = tl.minimum(row, seqlen_q - 1)
    visible = (row >= 0)[:, None] & counts[None, :]
    if IS_CAUSAL:
        visible = visible & (key[None, :] <= row[:, None] + (seqlen_k - seqlen_q))
    if HAS_MASK:
        address = mask_ptr + row.to(tl.int64)[:, None] * mask_row_stride + key.to(tl.int64)[None, :] * mask_key_stride
        visible = visible & (tl.load(address, mask=counts[None, :], other=0) != 0)
    return visible


@triton.jit
def load_bias(bias_ptr, bias_row_stride, bias_key_stride, row, key, seqlen_q, seqlen_k):
    """Returns (rows, keys) the bias times log2(e), NaN as -inf, above 2.3e38 as that; 0 beyond Sk."""
    row = tl.minimum(row, seqlen_q - 1)
    address = bias_ptr + row.to(tl.int64)[:, None] * bias_row_stride + key.to(tl.int64)[None, :] * bias_key_stride
    bias = tl.load(address, mask=(key < seqlen_k)[None, :], other=0.0).to(tl.float32)
    bias = tl.where(bias != bias, float("-inf"), bias)
    return tl.minimum(bias, 2.3e38) * 1.4426950408889634
