"""Attention over intervals as a torch operator with shapes known to the compiler and its own backward."""

from collections.abc import Callable

import torch

from flash_dmattn.call import AttentionCall
from flash_dmattn.dispatch import choose_backend

# Defined here rather than by torch.library.custom_op, whose checks at every call cost a short one a tenth of its time.
_LIBRARY = torch.library.Library("flash_dmattn", "FRAGMENT")


def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    importance: torch.Tensor | None,
    birth: torch.Tensor | None,
    death: torch.Tensor | None,
    query_start: torch.Tensor | None,
    query_positions: torch.Tensor | None,
    max_visible: int | None,
    softmax_scale: float,
    softcap: float,
    deterministic: bool,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns out (B, Sq, H, D), lse (B, H, Sq) and stats (2, B, H, Sq); arguments as in `AttentionCall`.

    stats is for the backward, because beside a huge importance lse has no room for the log of a sum: a number near
    each row's highest logit, times log2(e), inf where a row sees nothing; and log2 of the sum of exp of the logits
    less that number. It has no gradient.
    """
    call = AttentionCall(
        query,
        key,
        value,
        importance,
        birth,
        death,
        query_start,
        query_positions,
        max_visible,
        softmax_scale,
        softcap,
        deterministic,
    )
    with torch.cuda.device_of(query):  # a kernel runs on the current device, whatever its tensors are on
        return choose_backend(call, backend).forward(call)


def fake_attention(query, *_):
    """Returns out, lse and stats without contents."""
    batch, seqlen_q, num_heads, _ = query.shape
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    lse = query.new_empty((batch, num_heads, seqlen_q), dtype=dtype)
    return out, lse, query.new_empty((2, batch, num_heads, seqlen_q), dtype=dtype)


def fake_like(tensor: torch.Tensor) -> torch.Tensor:
    """Returns a contiguous tensor of this one's shape, without contents."""
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


def _attention_backward(
    dout: torch.Tensor,
    dlse: torch.Tensor,
    out: torch.Tensor,
    stats: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    importance: torch.Tensor | None,
    birth: torch.Tensor | None,
    death: torch.Tensor | None,
    query_start: torch.Tensor | None,
    query_positions: torch.Tensor | None,
    max_visible: int | None,
    softmax_scale: float,
    softcap: float,
    deterministic: bool,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns the gradients of query, key, value and importance; the last is empty without importance.

    An importance that is not finite has gradient 0.
    """
    call = AttentionCall(
        query,
        key,
        value,
        importance,
        birth,
        death,
        query_start,
        query_positions,
        max_visible,
        softmax_scale,
        softcap,
        deterministic,
    )
    with torch.cuda.device_of(query):
        engine = choose_backend(call, backend)
        dquery, dkey, dvalue, dimportance = engine.backward(call, out, stats, dout, dlse)
        if dimportance is None:
            return dquery, dkey, dvalue, stats.new_empty(0)
        return dquery, dkey, dvalue, torch.where(importance < torch.inf, dimportance, 0)


def _fake_attention_backward(dout, dlse, out, stats, query, key, value, importance, *_):
    dimportance = stats.new_empty(0) if importance is None else fake_like(importance)
    return fake_like(query), fake_like(key), fake_like(value), dimportance


def _setup_context(ctx, inputs, output) -> None:
    tensors, options = inputs[:8], inputs[8:]
    out, _, stats = output
    ctx.mark_non_differentiable(stats)
    ctx.save_for_backward(out, stats, *tensors)
    ctx.options = options


def _backward(ctx, dout, dlse, _):
    out, stats, query, key, value, importance, *rest = ctx.saved_tensors
    run = _FirstDerivative.apply if torch.is_grad_enabled() else interval_attention_backward_op
    dquery, dkey, dvalue, dimportance = run(dout, dlse, out, stats, query, key, value, importance, *rest, *ctx.options)
    dimportance = None if importance is None else dimportance
    return dquery, dkey, dvalue, dimportance, *(None,) * 9


def _define(name: str, function: Callable, fake: Callable) -> torch._ops.OpOverload:
    """Makes `function` an operator of the library, with `fake` to tell the shapes of what it returns."""
    schema = torch.library.infer_schema(function, mutates_args=())
    _LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"flash_dmattn::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.flash_dmattn, name).default


interval_attention_op = _define("interval_attention", _attention, fake_attention)
interval_attention_backward_op = _define("interval_attention_backward", _attention_backward, _fake_attention_backward)
torch.library.register_autograd(
    "flash_dmattn::interval_attention", _backward, setup_context=_setup_context, lib=_LIBRARY
)


class _FirstDerivative(torch.autograd.Function):
    """The operator of the gradients where those of gradients may be asked for (create_graph=True)."""

    @staticmethod
    def forward(*arguments):
        return interval_attention_backward_op(*arguments)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        pass

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError("dynamic mask attention has no second derivative")

    @staticmethod
    def vmap(info, in_dims, *arguments):
        def run(number):
            parts = (a if dim is None else a.select(dim, number) for a, dim in zip(arguments, in_dims, strict=True))
            return _FirstDerivative.apply(*parts)

        each = zip(*map(run, range(info.batch_size)), strict=True)
        return tuple(map(torch.stack, each)), (0, 0, 0, 0)


class _EagerAttention(torch.autograd.Function):
    """The operator with its gradient, past the autograd of torch.library, which reads the schema for 0.2 ms a call."""

    @staticmethod
    def forward(*arguments):
        return interval_attention_op(*arguments)

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

        out, lse, stats = run_attention(*map(as_batch, arguments, in_dims))
        size = (info.batch_size, -1)
        return (out.unflatten(0, size), lse.unflatten(0, size), stats.unflatten(1, size)), (0, 0, 1)


def run_attention(query, key, value, importance, *rest) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Calls the operator with its arguments, differentiably."""
    arguments = (query, key, value, importance, *rest)
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return interval_attention_op(*arguments)
    return _EagerAttention.apply(*arguments)
