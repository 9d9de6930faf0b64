"""The importance of one token of every batch row: a program per row and head.

It computes in float64 and rounds to float32, so that it ends in the bits of torch's, which sums in another order: a
token that is decoded ties with an equal one of the prompt.
"""

import functools

import torch
import triton
import triton.language as tl


def run_importance(
    value: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, A: torch.Tensor, max_exponent: float | None
) -> torch.Tensor:
    """Returns (B, Hi, 1) float32; arguments as in `flash_dmattn.token_importance`."""
    batch, num_kv_heads, _, head_dim = value.shape
    num_heads = weight.shape[0]
    out = torch.empty(batch, num_heads, 1, dtype=torch.float32, device=value.device)
    _importance[(batch, num_heads)](
        out,
        value,
        weight.contiguous(),
        A if bias is None else bias,
        A,
        value.stride(0),
        value.stride(1),
        0.0 if max_exponent is None else max_exponent,
        NUM_INPUTS=num_kv_heads * head_dim,
        HEAD_DIM=head_dim,
        BLOCK=_block(num_kv_heads * head_dim),
        HAS_BIAS=bias is not None,
        HAS_EXP=max_exponent is not None,
    )
    return out


@functools.cache
def _block(num_inputs: int) -> int:
    return min(1024, triton.next_power_of_2(num_inputs))


@triton.jit
def _importance(
    out_ptr,  # (B, Hi, 1)
    value_ptr,  # (B, Hkv, 1, D)
    weight_ptr,  # (Hi, Hkv * D)
    bias_ptr,  # (Hi,)
    A_ptr,  # (Hi,)
    value_batch_stride,
    value_head_stride,
    max_exponent,
    NUM_INPUTS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_EXP: tl.constexpr,
):
    batch = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    products = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, NUM_INPUTS, BLOCK):
        index = start + tl.arange(0, BLOCK)
        exists = index < NUM_INPUTS
        address = value_ptr + batch * value_batch_stride + (index // HEAD_DIM) * value_head_stride + index % HEAD_DIM
        value = tl.load(address, mask=exists, other=0.0).to(tl.float64)
        weight = tl.load(weight_ptr + head * NUM_INPUTS + index, mask=exists, other=0.0).to(tl.float64)
        products += value * weight
    dt = tl.sum(products, axis=0)
    if HAS_BIAS:
        dt += tl.load(bias_ptr + head).to(tl.float64)
    # log(1 + x) that keeps a small x, because it decides ties; beyond 20 it is dt.
    x = tl.exp(tl.minimum(dt, 20.0))
    one_more = 1.0 + x
    softplus = tl.where(one_more == 1.0, x, tl.log(one_more) * (x / tl.where(one_more == 1.0, 1.0, one_more - 1.0)))
    softplus = tl.where(dt > 20.0, dt, softplus)
    importance = tl.load(A_ptr + head).to(tl.float64) * softplus
    if HAS_EXP:
        importance = tl.exp(tl.minimum(importance, max_exponent))
    tl.store(out_ptr + batch * tl.num_programs(1) + head, importance.to(tl.float32))
