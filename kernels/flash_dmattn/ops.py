"""Attention over intervals as a torch operator with its own backward."""

from collections.abc import Callable

import torch

from flash_dmattn.calls import AttentionCall
from flash_dmattn.dispatch import ATTENTION, can_call_directly, choose, choose_backward
from flash_dmattn.operators import (
    EagerFunction,
    define_gradient,
    define_operator,
    fake_attention,
    fake_gradient,
    first_derivative,
    output_gradients,
    save_call,
    spread_gradients,
)


def run_attention(call: AttentionCall, backend: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Attends on the backend of that name, differentiably. Returns out (B, Sq, H, D) and lse (B, H, Sq)."""
    if can_call_directly(*call.tensors()):
        out, lse, _ = _call_directly(_attend, call, backend)
    else:
        out, lse, _ = _run(*call.flatten(), backend)
    return out, lse


def _attend(call: AttentionCall, backend: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns out (B, Sq, H, D), lse (B, H, Sq) and stats (2, B, H, Sq).

    stats is for the backward, because beside a huge importance lse has no room for the log of a sum: a number near
    each row's highest logit, times log2(e), inf where a row sees nothing; and log2 of the sum of exp of the logits
    less that number. It has no gradient.
    """
    with torch.cuda.device_of(call.query):  # a kernel runs on the current device, whatever its tensors are on
        return choose(ATTENTION, call, backend).forward(call)


def _attention(*arguments) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`_attend` as the operator calls it: with the arguments of an `AttentionCall` and the name of a backend."""
    return _attend(AttentionCall.unflatten(arguments), arguments[-1])


def _attention_backward(dout, dlse, out, stats, *arguments) -> tuple[torch.Tensor, ...]:
    """Returns the gradients of what is differentiable, an empty tensor for that of None."""
    call, backend = AttentionCall.unflatten(arguments), arguments[-1]
    with torch.cuda.device_of(call.query):
        gradients = list(choose_backward(call, backend).backward(call, out, stats, dout, dlse))
        gradients += [None] * (len(AttentionCall.DIFFERENTIABLE) - len(gradients))  # the last may be left out
        return tuple([stats.new_empty(0) if gradient is None else gradient for gradient in gradients])


def _fake_attention_backward(dout, dlse, out, stats, *arguments):
    return tuple(fake_gradient(arguments[index], stats) for index in AttentionCall.differentiable_indices)


def _setup_context(ctx, inputs, output) -> None:
    save_call(ctx, AttentionCall, inputs, output)


def _backward(ctx, dout, dlse, _):
    out, stats, *tensors = ctx.saved_tensors
    dout, dlse = output_gradients(dout, dlse, out, stats)
    arguments = (dout, dlse, out, stats, *tensors, *ctx.options)
    if can_call_directly(dout, dlse, out, *tensors):
        gradients = _call_directly(_attention_backward, *arguments)
    else:
        gradients = first_derivative(interval_attention_backward_op, *arguments)
    return spread_gradients(ctx, AttentionCall, gradients)


interval_attention_op = define_operator("interval_attention", AttentionCall, _attention, fake_attention, num_outputs=3)
interval_attention_backward_op = define_operator(
    "interval_attention_backward",
    AttentionCall,
    _attention_backward,
    _fake_attention_backward,
    num_outputs=len(AttentionCall.DIFFERENTIABLE),
    before=dict.fromkeys(("dout", "dlse", "out", "stats"), torch.Tensor),
)
define_gradient("interval_attention", _backward, _setup_context)


class _EagerAttention(EagerFunction):
    """The operator with its gradient, past the autograd of torch.library, which reads the schema for 0.2 ms a call."""

    @staticmethod
    def forward(*arguments):
        return _without_gradient(*arguments)

    setup_context = staticmethod(_setup_context)
    backward = staticmethod(_backward)

    @staticmethod
    def vmap(info, in_dims, *arguments):
        """Attends once, with what is mapped over as more rows of the batch."""

        def as_batch(tensor, dim):
            if not isinstance(tensor, torch.Tensor):
                return tensor
            mapped = tensor.expand(info.batch_size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
            return mapped.flatten(0, 1)

        out, lse, stats = _run(*map(as_batch, arguments, in_dims))
        size = (info.batch_size, -1)
        return (out.unflatten(0, size), lse.unflatten(0, size), stats.unflatten(1, size)), (0, 0, 1)


def _run(*arguments) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return _EagerAttention.apply(*arguments)
    return _without_gradient(*arguments)


def _without_gradient(*arguments) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    if can_call_directly(*arguments[: AttentionCall.num_tensors]):
        return _call_directly(_attention, *arguments)
    return interval_attention_op(*arguments)


def _call_directly(function: Callable, *arguments) -> tuple[torch.Tensor, ...]:
    with torch._C._AutoDispatchBelowAutograd():  # as inside the operator, where every step costs less
        return function(*arguments)
