"""Which tiles of a mask have to be looked at: each is empty, partial or full, found in one pass over the mask."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from flash_dmattn.dense.call import DenseCall

EMPTY, PARTIAL, FULL = 0, 1, 2


@dataclass(frozen=True)
class TileLists:
    """For every row of tiles, the tiles of it that are not empty, full ones first.

    order: (Bm, Hm, rows, columns) int32, tile numbers of a row, full ones, then partial, then empty ones.
    counts: (Bm, Hm, rows, 2) int32, how many are full, and how many are not empty.
    """

    order: torch.Tensor
    counts: torch.Tensor


def classify_tiles(call: DenseCall, grain_m: int, grain_n: int) -> torch.Tensor:
    """Returns (Bm, Hm, cdiv(Sq, grain_m), cdiv(Sk, grain_n)) uint8, the class of each tile of the call's mask.

    Keys beyond Sk are hidden; rows beyond Sq do not count. Bm and Hm are those of the mask, 1 and 1 without one.
    """
    mask = call.attn_mask
    seqlen_q, seqlen_k = call.query.shape[1], call.key.shape[1]
    batch, heads = (1, 1) if mask is None else mask.shape[:2]
    shape = (batch, heads, triton.cdiv(seqlen_q, grain_m), triton.cdiv(seqlen_k, grain_n))
    classes = torch.empty(shape, dtype=torch.uint8, device=call.query.device)
    span = 4
    _classify[(triton.cdiv(shape[3], span), shape[2], batch * heads)](
        classes,
        *mask_arguments(call),
        heads,
        seqlen_q,
        seqlen_k,
        shape[3],
        HAS_MASK=mask is not None,
        IS_CAUSAL=call.is_causal,
        GRAIN_M=grain_m,
        GRAIN_N=grain_n,
        SPAN=span,
    )
    return classes


def list_tiles(classes: torch.Tensor, rows: int, columns: int, are_rows_keys: bool = False) -> TileLists:
    """Returns the lists of tiles that are `rows` x `columns` of the classified ones; of keys when these are rows."""
    classes = _merge(_merge(classes, rows, 2, are_rows_keys), columns, 3, not are_rows_keys)
    order = classes.argsort(dim=-1, descending=True, stable=True).int()
    counts = torch.stack([(classes == FULL).sum(-1), (classes != EMPTY).sum(-1)], dim=-1).int()
    return TileLists(order, counts)


def merge_heads(classes: torch.Tensor, num_kv_heads: int) -> torch.Tensor:
    """Returns classes (Bm, 1 or Hkv, rows, columns): a tile's class for all heads of a group together."""
    if classes.shape[1] <= num_kv_heads:
        return classes
    return _merge(classes, classes.shape[1] // num_kv_heads, 1, is_edge_hidden=False)


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


def _merge(classes: torch.Tensor, count: int, dim: int, is_edge_hidden: bool) -> torch.Tensor:
    """Joins `count` neighbors: empty or full when all are. Beyond the edge everything is hidden, or does not count."""
    missing = -classes.shape[dim] % count
    if count == 1:
        return classes
    if missing:
        last = classes.narrow(dim, classes.shape[dim] - 1, 1)
        filler = torch.zeros_like(last) if is_edge_hidden else last
        classes = torch.cat([classes, *[filler] * missing], dim=dim)
    least, most = (bound(classes.unflatten(dim, (-1, count)), dim=dim + 1) for bound in (torch.amin, torch.amax))
    return torch.where(least == most, most, PARTIAL).to(torch.uint8)


@triton.jit
def _classify(
    classes_ptr,  # (Bm, Hm, rows, columns) uint8
    mask_ptr,  # (Bm, Hm, Sq, Sk)
    mask_batch_stride,
    mask_head_stride,
    mask_row_stride,
    mask_key_stride,
    heads,
    seqlen_q,
    seqlen_k,
    columns,
    HAS_MASK: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    GRAIN_M: tl.constexpr,
    GRAIN_N: tl.constexpr,
    SPAN: tl.constexpr,
):
    lane = tl.program_id(2)
    row = tl.program_id(1) * GRAIN_M + tl.arange(0, GRAIN_M)
    exists = row < seqlen_q
    mask_ptr += (lane // heads).to(tl.int64) * mask_batch_stride + (lane % heads).to(tl.int64) * mask_head_stride
    for column in range(tl.program_id(0) * SPAN, tl.minimum((tl.program_id(0) + 1) * SPAN, columns)):
        key = column * GRAIN_N + tl.arange(0, GRAIN_N)
        visible = load_visible(
            mask_ptr, mask_row_stride, mask_key_stride, row, key, seqlen_q, seqlen_k, HAS_MASK, IS_CAUSAL
        )
        any_visible = tl.max(tl.max((visible & exists[:, None]).to(tl.int32), axis=1), axis=0)
        all_visible = tl.min(tl.min((visible | (row >= seqlen_q)[:, None]).to(tl.int32), axis=1), axis=0)
        place = (lane.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)) * columns + column
        tl.store(classes_ptr + place, (any_visible + all_visible * any_visible).to(tl.uint8))


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
