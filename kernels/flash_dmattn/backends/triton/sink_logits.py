"""Attention sinks: a program scales a block of rows of one head, and its gradient goes the same way."""

import torch
import triton
import triton.language as tl

_BLOCK = 4096  # numbers of a program, 16-bit ones 8 KB of loads under way

# What differs from step to step of a server: no variant is compiled for some of its values.
_CHANGING = ("seqlen", "num_blocks", "lse_batch_stride", "lse_head_stride")


def run_sinks(out: torch.Tensor, lse: torch.Tensor, sinks: torch.Tensor, result: torch.Tensor) -> None:
    """Writes out * sigmoid(lse - sinks) into result, which may be out.

    out, result: (B, T, H, D). lse: (B, H, T). sinks: (H,). Any strides.
    """
    blocks, options = _launch_options(out)
    if result.numel() > 0:
        _scale_rows[(blocks * out.shape[2],)](
            result, out, lse, sinks, *result.stride(), *out.stride(), *lse.stride(), sinks.stride(0), **options
        )


def run_sinks_backward(
    dresult: torch.Tensor, out: torch.Tensor, lse: torch.Tensor, sinks: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns dout (B, T, H, D), dlse (B, H, T) float32 and dsinks (H,), in the dtypes of out and sinks.

    The sum over rows is taken over the programs' partial sums, in a fixed order.
    """
    batch, seqlen, num_heads, _ = out.shape
    blocks, options = _launch_options(out)
    dout = torch.empty_like(out, memory_format=torch.contiguous_format)
    dlse = torch.empty(batch, num_heads, seqlen, dtype=torch.float32, device=out.device)
    partial_sums = torch.empty(blocks, num_heads, dtype=torch.float32, device=out.device)
    if partial_sums.numel() > 0:
        _scale_rows_backward[(partial_sums.numel(),)](
            dout,
            dlse,
            partial_sums,
            dresult,
            out,
            lse,
            sinks,
            *dresult.stride(),
            *out.stride(),
            *lse.stride(),
            sinks.stride(0),
            **options,
        )
    return dout, dlse, partial_sums.sum(0).neg_().to(sinks.dtype)


def _launch_options(out: torch.Tensor) -> tuple[int, dict[str, int]]:
    """Returns how many blocks of rows all sequences have, and what both kernels are told besides tensors."""
    batch, seqlen, num_heads, head_dim = out.shape
    width = triton.next_power_of_2(max(head_dim, 1))
    rows = _BLOCK // width
    blocks = triton.cdiv(seqlen, rows)
    sizes = {"seqlen": seqlen, "num_heads": num_heads, "num_blocks": blocks}
    constants = {"HEAD_DIM": head_dim, "ROWS": rows, "WIDTH": width, "num_warps": 4}
    return batch * blocks, {**sizes, **constants}


@triton.jit
def _place(num_heads, num_blocks, ROWS: tl.constexpr):
    """Returns batch row, head and rows of this program. Heads come first: their rows lie next to each other."""
    program = tl.program_id(0)
    block = program // num_heads
    row = (block % num_blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    return (block // num_blocks).to(tl.int64), (program % num_heads).to(tl.int64), row


@triton.jit
def _share(lse, sink):
    """Returns the share of the visible keys and that of the sink, in float32; of a row that sees no key 0 and 1."""
    logit = lse - tl.where(lse == float("-inf"), 0.0, sink)
    less = tl.exp(-tl.abs(logit))  # at most 1
    smaller = less / (1.0 + less)
    larger = 1.0 / (1.0 + less)
    return tl.where(logit < 0.0, smaller, larger), tl.where(logit < 0.0, larger, smaller)


@triton.jit(do_not_specialize=_CHANGING)
def _scale_rows(
    result_ptr,  # (B, T, H, D)
    out_ptr,  # (B, T, H, D)
    lse_ptr,  # (B, H, T)
    sinks_ptr,  # (H,)
    result_batch_stride,
    result_row_stride,
    result_head_stride,
    result_stride,
    out_batch_stride,
    out_row_stride,
    out_head_stride,
    out_stride,
    lse_batch_stride,
    lse_head_stride,
    lse_stride,
    sinks_stride,
    seqlen,
    num_heads,
    num_blocks,
    HEAD_DIM: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    batch, head, row = _place(num_heads, num_blocks, ROWS)
    column = tl.arange(0, WIDTH)
    exists = (row < seqlen)[:, None] & (column < HEAD_DIM)[None, :]
    sink = tl.load(sinks_ptr + head * sinks_stride).to(tl.float32)
    lse_ptr += batch * lse_batch_stride + head * lse_head_stride
    share, _ = _share(tl.load(lse_ptr + row * lse_stride, mask=row < seqlen, other=0.0), sink)
    out_ptr += batch * out_batch_stride + head * out_head_stride
    out = tl.load(out_ptr + row[:, None] * out_row_stride + column[None, :] * out_stride, mask=exists, other=0.0)
    result_ptr += batch * result_batch_stride + head * result_head_stride
    result_ptrs = result_ptr + row[:, None] * result_row_stride + column[None, :] * result_stride
    tl.store(result_ptrs, out.to(tl.float32) * share[:, None], mask=exists)


@triton.jit(do_not_specialize=_CHANGING)
def _scale_rows_backward(
    dout_ptr,  # (B, T, H, D), contiguous
    dlse_ptr,  # (B, H, T), contiguous
    partial_sums_ptr,  # (blocks, H), contiguous
    dresult_ptr,  # (B, T, H, D)
    out_ptr,  # (B, T, H, D)
    lse_ptr,  # (B, H, T)
    sinks_ptr,  # (H,)
    dresult_batch_stride,
    dresult_row_stride,
    dresult_head_stride,
    dresult_stride,
    out_batch_stride,
    out_row_stride,
    out_head_stride,
    out_stride,
    lse_batch_stride,
    lse_head_stride,
    lse_stride,
    sinks_stride,
    seqlen,
    num_heads,
    num_blocks,
    HEAD_DIM: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    batch, head, row = _place(num_heads, num_blocks, ROWS)
    column = tl.arange(0, WIDTH)
    exists = (row < seqlen)[:, None] & (column < HEAD_DIM)[None, :]
    sink = tl.load(sinks_ptr + head * sinks_stride).to(tl.float32)
    lse_ptr += batch * lse_batch_stride + head * lse_head_stride
    share, rest = _share(tl.load(lse_ptr + row * lse_stride, mask=row < seqlen, other=0.0), sink)
    out_ptr += batch * out_batch_stride + head * out_head_stride
    out = tl.load(out_ptr + row[:, None] * out_row_stride + column[None, :] * out_stride, mask=exists, other=0.0)
    dresult_ptr += batch * dresult_batch_stride + head * dresult_head_stride
    dresult_ptrs = dresult_ptr + row[:, None] * dresult_row_stride + column[None, :] * dresult_stride
    dresult = tl.load(dresult_ptrs, mask=exists, other=0.0).to(tl.float32)
    dout_ptr += ((batch * seqlen + row) * num_heads + head)[:, None] * HEAD_DIM + column[None, :]
    tl.store(dout_ptr, dresult * share[:, None], mask=exists)
    dlse = share * rest * tl.sum(dresult * out.to(tl.float32), axis=1)
    tl.store(dlse_ptr + (batch * num_heads + head) * seqlen + row, dlse, mask=row < seqlen)
    tl.store(partial_sums_ptr + tl.program_id(0), tl.sum(dlse, axis=0))
