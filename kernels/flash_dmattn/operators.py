"""How a call, a value with named fields, goes through a torch operator, which knows only tensors and numbers."""

import inspect
from collections.abc import Callable
from typing import get_args

import torch
from torch._functorch.utils import unwrap_dead_wrappers

# Operators are defined here rather than by torch.library.custom_op, whose checks at every call cost a short one a tenth
# of its time.
_LIBRARY = torch.library.Library("flash_dmattn", "FRAGMENT")


class OperatorCall:
    """A dataclass that a torch operator takes as one argument per field, in their order, tensors before numbers.

    A field that is a NamedTuple of tensors, or None, becomes one argument per tensor, named `field_part`.

    DIFFERENTIABLE: names of the operator's arguments that have a gradient, in the order of a backward's results;
    differentiable_indices are their places. num_tensors: how many arguments are tensors.
    """

    DIFFERENTIABLE: tuple[str, ...] = ()

    def __init_subclass__(cls) -> None:
        cls._layout = tuple((name, _named_tuple(kind)) for name, kind in cls.__annotations__.items())
        cls.num_tensors = sum(kind in (torch.Tensor, torch.Tensor | None) for kind in cls.parameters().values())
        cls.differentiable_indices = [list(cls.parameters()).index(name) for name in cls.DIFFERENTIABLE]

    @classmethod
    def parameters(cls) -> dict[str, type]:
        """Returns the operator's arguments with their types."""
        parameters = {}
        for name, group in cls._layout:
            kind = cls.__annotations__[name]
            if group is None:
                parameters[name] = kind
            else:
                part = torch.Tensor if kind is group else torch.Tensor | None
                parameters.update({f"{name}_{field}": part for field in group._fields})
        return parameters

    def flatten(self) -> list:
        """Returns the operator's arguments."""
        flat = []
        for name, group in self._layout:
            value = getattr(self, name)
            if group is None:
                flat.append(value)
            else:
                flat.extend([None] * len(group._fields) if value is None else value)
        return flat

    @classmethod
    def unflatten(cls, arguments):
        """Returns the call that `flatten` took apart."""
        arguments = iter(arguments)
        fields = {}
        for name, group in cls._layout:
            if group is None:
                fields[name] = next(arguments)
            else:
                parts = [next(arguments) for _ in group._fields]
                fields[name] = None if parts[0] is None else group(*parts)
        call = object.__new__(cls)
        vars(call).update(fields)  # the __init__ of a frozen dataclass takes longer than all the rest here
        return call


def _named_tuple(kind: type) -> type | None:
    """Returns the NamedTuple that a field of this type holds, or None."""
    for option in get_args(kind) or (kind,):
        if hasattr(option, "_fields"):
            return option
    return None


def define_operator(
    name: str,
    kind: type[OperatorCall],
    function: Callable,
    fake: Callable,
    *,
    num_outputs: int,
    before: dict | None = None,
) -> torch._ops.OpOverload:
    """Makes `function` the operator `flash_dmattn::name`, with `fake` to tell the shapes of what it returns.

    It takes the arguments `before`, a type for each name, those of a call of that kind, and the name of a backend. It
    returns `num_outputs` tensors, a tuple unless it is one.
    """
    returns = torch.Tensor if num_outputs == 1 else tuple[(torch.Tensor,) * num_outputs]
    function.__signature__ = signature(kind, returns, before)
    _LIBRARY.define(name + torch.library.infer_schema(function, mutates_args=()), tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"flash_dmattn::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.flash_dmattn, name).default


def define_gradient(name: str, backward: Callable, setup_context: Callable) -> None:
    """Gives the operator `flash_dmattn::name` its gradient."""
    torch.library.register_autograd(f"flash_dmattn::{name}", backward, setup_context=setup_context, lib=_LIBRARY)


def signature(kind: type[OperatorCall], returns: type, before: dict | None = None) -> inspect.Signature:
    """Returns the signature that torch reads an operator's schema from; the arguments as in `define_operator`."""
    types = {**(before or {}), **kind.parameters(), "backend": str}
    place = inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters = [inspect.Parameter(name, place, annotation=annotation) for name, annotation in types.items()]
    return inspect.Signature(parameters, return_annotation=returns)


def save_call(ctx, kind: type[OperatorCall], inputs: tuple, output: tuple) -> None:
    """Saves an operator's inputs, and out and stats of its (out, lse, stats), for its backward."""
    out, _, stats = output
    ctx.mark_non_differentiable(stats)
    ctx.set_materialize_grads(False)  # else zeros are launched for stats
    ctx.save_for_backward(out, stats, *inputs[: kind.num_tensors])
    ctx.options = inputs[kind.num_tensors :]


def output_gradients(dout, dlse, out: torch.Tensor, stats: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns dout and dlse, zeros for one that is None."""
    dout = torch.zeros_like(out) if dout is None else dout
    return dout, stats.new_zeros(stats.shape[1:]) if dlse is None else dlse


def spread_gradients(ctx, kind: type[OperatorCall], gradients: tuple[torch.Tensor, ...]) -> tuple:
    """Returns a gradient or None per input of the operator, given those of what is differentiable."""
    spread = [None] * len(ctx.needs_input_grad)
    for index, gradient in zip(kind.differentiable_indices, gradients, strict=True):
        spread[index] = gradient if ctx.needs_input_grad[index] else None
    return tuple(spread)


class EagerFunction(torch.autograd.Function):
    """An autograd function of positional arguments. Torch would look up the signature of its forward at every call."""

    @classmethod
    def apply(cls, *arguments):
        if torch._C._are_functorch_transforms_active():
            return super().apply(*arguments)
        return super(torch.autograd.Function, cls).apply(*unwrap_dead_wrappers(arguments))


def first_derivative(operator: torch._ops.OpOverload, *arguments) -> torch.Tensor | tuple[torch.Tensor, ...]:
    """Calls the operator of a backward, which refuses to be differentiated itself (create_graph=True)."""
    return _FirstDerivative.apply(operator, *arguments) if torch.is_grad_enabled() else operator(*arguments)


class _FirstDerivative(torch.autograd.Function):
    @staticmethod
    def forward(operator, *arguments):
        return operator(*arguments)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        pass

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError("dynamic mask attention has no second derivative")

    @staticmethod
    def vmap(info, in_dims, *arguments):
        return run_slices(_FirstDerivative.apply, info, in_dims, arguments)


def run_slices(function: Callable, info, in_dims: tuple, arguments: tuple) -> tuple:
    """Maps a function over a batch as autograd.Function.vmap is to do, slice by slice."""

    def run(number):
        parts = (a if dim is None else a.select(dim, number) for a, dim in zip(arguments, in_dims, strict=True))
        return function(*parts)

    results = list(map(run, range(info.batch_size)))
    if isinstance(results[0], torch.Tensor):
        return torch.stack(results), 0
    stacked = tuple([torch.stack(each) for each in zip(*results, strict=True)])
    return stacked, (0,) * len(stacked)


def fake_attention(query, *_):
    """Returns out, lse and stats without contents. Raises RuntimeError while exporting to ONNX, which comes by here."""
    if torch.onnx.is_in_onnx_export():
        raise RuntimeError(
            "flash_dmattn cannot be exported to ONNX, which has no operator for it: load the model with "
            'attn_implementation="sdpa" for that, or use torch.export.export'
        )
    batch, seqlen_q, num_heads, _ = query.shape
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    lse = query.new_empty((batch, num_heads, seqlen_q), dtype=dtype)
    return out, lse, query.new_empty((2, batch, num_heads, seqlen_q), dtype=dtype)


def fake_gradient(tensor: torch.Tensor | None, stats: torch.Tensor) -> torch.Tensor:
    """Returns a contiguous tensor of this one's shape without contents; an empty one for None."""
    return stats.new_empty(0) if tensor is None else torch.empty_like(tensor, memory_format=torch.contiguous_format)
