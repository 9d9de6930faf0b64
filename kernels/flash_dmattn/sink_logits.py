"""Attention sinks: a learned logit per head that takes a share of every softmax and gives nothing for it.

    out_t = o_t * sigmoid(lse_t - s)

Here o_t and lse_t are what attention without sinks gives a row, and s is the logit of its head: exp(s) is added to what
the softmax divides by. Backends do it in one pass over `out` each way.
"""

from dataclasses import dataclass

import torch

from flash_dmattn.dispatch import SINK_LOGITS, is_transformed, is_watched, prefer
from flash_dmattn.operators import (
    EagerFunction,
    OperatorCall,
    define_gradient,
    define_operator,
    fake_gradient,
    first_derivative,
    spread_gradients,
)


def with_sinks(
    out: torch.Tensor, lse: torch.Tensor, sinks: torch.Tensor, *, may_overwrite: bool = False, backend: str = "auto"
) -> torch.Tensor:
    """Returns out * sigmoid(lse - sinks), differentiably; a query that sees no key keeps its 0.

    out: (B, T, H, D), floating point.
    lse: (B, H, T) natural-log sum of exp of each query's logits, float32 (float64 for float64).
    sinks: (H,), floating point.
    may_overwrite: nobody else reads `out`: where no gradient is wanted the result may stand in its memory.
    backend: as in `interval_attention`; a backend that does not do this leaves it to the others.

    Returns (B, T, H, D) in out's dtype. Raises ValueError for shapes that do not fit. There is no second derivative
    where a backend serves.
    """
    batch, seqlen, num_heads, _ = out.shape
    if lse.shape != (batch, num_heads, seqlen):
        raise ValueError(f"lse must have shape {(batch, num_heads, seqlen)}, got {tuple(lse.shape)}")
    if sinks.shape != (num_heads,):
        raise ValueError(f"sinks must have shape ({num_heads},), got {tuple(sinks.shape)}")
    tensors = out, lse, sinks
    server = None if is_transformed(*tensors) else prefer(SINK_LOGITS, backend, out.device, *tensors)
    if server is None:  # a compiler fuses these operations itself
        # Without sinks where no key is seen: -inf less -inf would be NaN.
        logit = lse - torch.where(lse == -torch.inf, 0, sinks.to(lse.dtype)[:, None])
        return (out * torch.sigmoid(logit).transpose(1, 2).unsqueeze(-1)).to(out.dtype)
    name = next(name for name, found in SINK_LOGITS.backends.items() if found is server)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return _EagerSinks.apply(*tensors, name)
    if may_overwrite and not is_watched(*tensors):
        return _scale(*tensors, name, out)
    return _without_gradient(*tensors, name)


@dataclass(frozen=True)
class _SinkCall(OperatorCall):
    """The tensors of the operator, shaped as in `with_sinks`."""

    out: torch.Tensor
    lse: torch.Tensor
    sinks: torch.Tensor

    DIFFERENTIABLE = ("out", "lse", "sinks")


def _scale(out, lse, sinks, backend: str, result: torch.Tensor) -> torch.Tensor:
    with torch.cuda.device_of(out):  # a kernel runs on the current device, whatever its tensors are on
        SINK_LOGITS.backends[backend].with_sinks(out, lse, sinks, result)
    return result


def _scaled(out, lse, sinks, backend) -> torch.Tensor:
    return _scale(out, lse, sinks, backend, torch.empty_like(out, memory_format=torch.contiguous_format))


def _scaled_backward(dresult, out, lse, sinks, backend) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    with torch.cuda.device_of(out):
        return SINK_LOGITS.backends[backend].with_sinks_backward(dresult, out, lse, sinks)


def _fake_scaled(out, *_) -> torch.Tensor:
    return fake_gradient(out, out)


def _fake_scaled_backward(dresult, *arguments) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return tuple(fake_gradient(tensor, dresult) for tensor in arguments[: _SinkCall.num_tensors])


_with_sinks_op = define_operator("with_sinks", _SinkCall, _scaled, _fake_scaled, num_outputs=1)
_with_sinks_backward_op = define_operator(
    "with_sinks_backward",
    _SinkCall,
    _scaled_backward,
    _fake_scaled_backward,
    num_outputs=3,
    before={"dresult": torch.Tensor},
)


def _setup_context(ctx, inputs, output) -> None:
    """Saves the same whoever watches: a checkpoint may be watched in its forward, and not when that is run again.

    It is what attention saves for its own backward, `out` before the sinks and lse.
    """
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[: _SinkCall.num_tensors])
    ctx.backend = inputs[-1]


def _backward(ctx, dresult):
    if dresult is None:
        return None, None, None, None
    gradients = first_derivative(_gradients, dresult, *ctx.saved_tensors, ctx.backend)
    return spread_gradients(ctx, _SinkCall, gradients)


def _gradients(*arguments) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return (_with_sinks_backward_op if is_watched(*arguments[:-1]) else _scaled_backward)(*arguments)


define_gradient("with_sinks", _backward, _setup_context)


class _EagerSinks(EagerFunction):
    """The operator with its gradient, past the autograd of torch.library, as that of attention."""

    @staticmethod
    def forward(*arguments):
        return _without_gradient(*arguments)

    setup_context = staticmethod(_setup_context)
    backward = staticmethod(_backward)


def _without_gradient(*arguments) -> torch.Tensor:
    """Calls the operator where a mode intercepts operations, else its function, which takes the host less time."""
    return (_with_sinks_op if is_watched(*arguments[:-1]) else _scaled)(*arguments)
