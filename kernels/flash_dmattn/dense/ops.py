"""Attention under a mask and a bias as a torch operator with its own backward."""

import torch

from flash_dmattn.dense.call import DenseCall
from flash_dmattn.dense.engines import ENGINES
from flash_dmattn.dispatch import choose_backend
from flash_dmattn.ops import fake_attention, fake_like


@torch.library.custom_op("flash_dmattn::dense_attention", mutates_args=())
def dense_attention_op(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None,
    attn_bias: torch.Tensor | None,
    tiles: torch.Tensor | None,
    is_causal: bool,
    softmax_scale: float,
    softcap: float,
    deterministic: bool,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns out (B, Sq, H, D), lse (B, H, Sq) and stats (2, B, H, Sq) as `interval_attention_op`; see `DenseCall`."""
    call = DenseCall(query, key, value, attn_mask, attn_bias, is_causal, softmax_scale, softcap, deterministic, tiles)
    with torch.cuda.device_of(query):
        return choose_backend(call, backend, ENGINES).forward(call)


dense_attention_op.register_fake(fake_attention)


@torch.library.custom_op("flash_dmattn::dense_attention_backward", mutates_args=())
def dense_attention_backward_op(
    dout: torch.Tensor,
    dlse: torch.Tensor,
    out: torch.Tensor,
    stats: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None,
    attn_bias: torch.Tensor | None,
    tiles: torch.Tensor | None,
    needs_dbias: bool,
    is_causal: bool,
    softmax_scale: float,
    softcap: float,
    deterministic: bool,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns the gradients of query, key, value and attn_bias; the last is empty unless it is needed."""
    call = DenseCall(query, key, value, attn_mask, attn_bias, is_causal, softmax_scale, softcap, deterministic, tiles)
    with torch.cuda.device_of(query):
        engine = choose_backend(call, backend, ENGINES)
        dquery, dkey, dvalue, dbias = engine.backward(call, out, stats, dout, dlse, needs_dbias)
    return dquery, dkey, dvalue, stats.new_empty(0) if dbias is None else dbias


@dense_attention_backward_op.register_fake
def _(dout, dlse, out, stats, query, key, value, attn_mask, attn_bias, tiles, needs_dbias, *_):
    dbias = fake_like(attn_bias) if needs_dbias else stats.new_empty(0)
    return fake_like(query), fake_like(key), fake_like(value), dbias


def _setup_context(ctx, inputs, output) -> None:
    tensors, options = inputs[:6], inputs[6:]
    out, _, stats = output
    ctx.mark_non_differentiable(stats)
    ctx.save_for_backward(out, stats, *tensors)
    ctx.options = options


def _backward(ctx, dout, dlse, _):
    out, stats, query, key, value, attn_mask, attn_bias, tiles = ctx.saved_tensors
    needs_dbias = ctx.needs_input_grad[4]
    dquery, dkey, dvalue, dbias = dense_attention_backward_op(
        dout, dlse, out, stats, query, key, value, attn_mask, attn_bias, tiles, needs_dbias, *ctx.options
    )
    return dquery, dkey, dvalue, None, dbias if needs_dbias else None, *(None,) * 6


dense_attention_op.register_autograd(_backward, setup_context=_setup_context)
