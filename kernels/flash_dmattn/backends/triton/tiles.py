"""Pieces that the forward and the backward kernels share: gathering keys, scoring them, walking a query tile."""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def tanh(x):
    return 2 / (1 + tl.exp2(-2 * 1.4426950408889634 * x)) - 1


@triton.jit
def load_keys(entries_ptr, offset, end, BLOCK_N: tl.constexpr, MASKED: tl.constexpr):
    """Loads BLOCK_N key numbers of a list; lanes past `end` are marked when MASKED, and do not exist otherwise."""
    place = offset + tl.arange(0, BLOCK_N)
    if MASKED:
        is_listed = place < end
        return tl.load(entries_ptr + place, mask=is_listed, other=0), is_listed
    return tl.load(entries_ptr + place), place >= 0


@triton.jit
def gather_rows(ptr, index, stride, is_listed, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr):
    """Gathers rows of a (S, D) matrix as (BLOCK, BLOCK_D), zero where nothing is listed and beyond the head dim."""
    dim = tl.arange(0, BLOCK_D)
    address = ptr + index.to(tl.int64)[:, None] * stride + dim[None, :]
    if HEAD_DIM == BLOCK_D:
        if MASKED:
            return tl.load(address, mask=is_listed[:, None], other=0.0)
        return tl.load(address)
    return tl.load(address, mask=is_listed[:, None] & (dim < HEAD_DIM)[None, :], other=0.0)


@triton.jit
def query_tile(
    epoch, tile, seqlen_q, EPOCH: tl.constexpr, TILE: tl.constexpr, GROUP: tl.constexpr, BLOCK_M: tl.constexpr
):
    """Returns, for the BLOCK_M rows of a query tile: the query, the head in its group, whether the row exists."""
    lane = tl.arange(0, BLOCK_M)
    token = tile * TILE + lane // GROUP
    query = epoch * EPOCH + token
    return query, lane % GROUP, (lane < TILE * GROUP) & (token < EPOCH) & (query < seqlen_q)


@triton.jit
def query_rows(
    start_ptr, positions_ptr, batch, query, exists, seqlen_q, HAS_START: tl.constexpr, HAS_POSITIONS: tl.constexpr
):
    """Returns the row numbers of queries, -1 where a row sees nothing."""
    if HAS_POSITIONS:
        return tl.load(positions_ptr + batch.to(tl.int64) * seqlen_q + query, mask=exists, other=-1)
    return tl.where(exists, tl.load(start_ptr + batch) + query, -1)
