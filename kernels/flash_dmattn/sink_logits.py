"""Attention sinks: a learned logit per head that takes a share of every softmax and gives nothing for it.

    out_t = o_t * sigmoid(lse_t - s)

Here o_t and lse_t are what attention without sinks gives a row, and s is the logit of its head: exp(s) is added to what
the softmax divides by. Backends do it in one pass over `out` each way.
"""

from types import ModuleType

import torch

from flash_dmattn.dispatch import SINK_LOGITS, is_watched, prefer
from flash_dmattn.operators import first_derivative


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
    server = None if is_watched(*tensors) else prefer(SINK_LOGITS, backend, out.device, *tensors)
    if server is None:  # a compiler fuses these operations itself
        # Without sinks where no key is seen: -inf less -inf would be NaN.
        logit = lse - torch.where(lse == -torch.inf, 0, sinks.to(lse.dtype)[:, None])
        return (out * torch.sigmoid(logit).transpose(1, 2).unsqueeze(-1)).to(out.dtype)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return _WithSinks.apply(*tensors, server)
    return _run(server, *tensors, out if may_overwrite else _empty(out))


def _empty(out: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(out, memory_format=torch.contiguous_format)


def _run(server: ModuleType, out, lse, sinks, result) -> torch.Tensor:
    with torch.cuda.device_of(out):  # a kernel runs on the current device, whatever its tensors are on
        server.with_sinks(out, lse, sinks, result)
    return result


class _WithSinks(torch.autograd.Function):
    """What attention saves for its own backward is all that is saved: `out` before the sinks and lse."""

    @staticmethod
    def forward(ctx, out, lse, sinks, server):
        ctx.save_for_backward(out, lse, sinks)
        ctx.server = server
        ctx.set_materialize_grads(False)
        return _run(server, out, lse, sinks, _empty(out))

    @staticmethod
    def backward(ctx, dresult):
        if dresult is None:
            return None, None, None, None
        saved = out, _, _ = ctx.saved_tensors
        with torch.cuda.device_of(out):
            gradients = first_derivative(ctx.server.with_sinks_backward, dresult, *saved)
        needed = zip(gradients, ctx.needs_input_grad[:3], strict=True)
        return *[gradient if is_needed else None for gradient, is_needed in needed], None
