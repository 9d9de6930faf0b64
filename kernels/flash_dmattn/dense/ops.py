"""Attention under a mask and a bias as a torch operator with its own backward."""

import torch

from flash_dmattn.calls import DenseCall
from flash_dmattn.dispatch import DENSE_ATTENTION, choose
from flash_dmattn.operators import (
    define_gradient,
    define_operator,
    fake_attention,
    fake_gradient,
    first_derivative,
    output_gradients,
    save_call,
    spread_gradients,
)


def _attention(*arguments) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns out (B, Sq, H, D), lse (B, H, Sq) and stats (2, B, H, Sq) as `interval_attention_op`."""
    call, backend = DenseCall.unflatten(arguments), arguments[-1]
    with torch.cuda.device_of(call.query):
        return choose(DENSE_ATTENTION, call, backend).forward(call)


def _attention_backward(dout, dlse, out, stats, needs_dbias, *arguments) -> tuple[torch.Tensor, ...]:
    """Returns the gradients of query, key, value and attn_bias; the last is empty unless it is needed."""
    call, backend = DenseCall.unflatten(arguments), arguments[-1]
    with torch.cuda.device_of(call.query):
        run = choose(DENSE_ATTENTION, call, backend).backward
        dquery, dkey, dvalue, dbias = run(call, out, stats, dout, dlse, needs_dbias)
    return dquery, dkey, dvalue, stats.new_empty(0) if dbias is None else dbias


def _fake_attention_backward(dout, dlse, out, stats, needs_dbias, *arguments):
    tensors = [arguments[index] for index in DenseCall.differentiable_indices]
    if not needs_dbias:
        tensors[-1] = None
    return tuple(fake_gradient(tensor, stats) for tensor in tensors)


def _setup_context(ctx, inputs, output) -> None:
    save_call(ctx, DenseCall, inputs, output)


def _backward(ctx, dout, dlse, _):
    out, stats, *tensors = ctx.saved_tensors
    dout, dlse = output_gradients(dout, dlse, out, stats)
    needs_dbias = ctx.needs_input_grad[DenseCall.differentiable_indices[-1]]
    arguments = (dout, dlse, out, stats, needs_dbias, *tensors, *ctx.options)
    return spread_gradients(ctx, DenseCall, first_derivative(dense_attention_backward_op, *arguments))


dense_attention_op = define_operator("dense_attention", DenseCall, _attention, fake_attention, num_outputs=3)
dense_attention_backward_op = define_operator(
    "dense_attention_backward",
    DenseCall,
    _attention_backward,
    _fake_attention_backward,
    num_outputs=len(DenseCall.DIFFERENTIABLE),
    before={**dict.fromkeys(("dout", "dlse", "out", "stats"), torch.Tensor), "needs_dbias": bool},
)
define_gradient("dense_attention", _backward, _setup_context)
