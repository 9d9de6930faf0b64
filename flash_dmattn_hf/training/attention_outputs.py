"""What the attention modules of a student and its teacher give out, and how far apart the two are.

The loss at a model's output does not ask every head for the keys it reads: where a few heads that hold an answer are
enough for most of its words, the others get no gradient. The error of every layer's attention asks all of them.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from flash_dmattn_hf.gates.attach import iter_gates
from flash_dmattn_hf.parallel.context import ContextParallel
from flash_dmattn_hf.thread_slot import ThreadSlot
from flash_dmattn_hf.training.distillation_loss import TokenWeights

_OUTPUT = "_attention_output"

_KEY = -2
"""Of the hook, in every module, as of `gates.hidden_states`."""

_collecting = ThreadSlot()
"""Whether forwards of this thread leave the outputs of hooked modules on them."""


class AttentionOutputs:
    """The outputs of the attention modules that have a gate in a student, and of those of the same names in a teacher.

    Hooks that stay, because hooks that come and go would make torch.compile compile again; use it as a context manager.
    Raises ValueError for a teacher without such modules.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module) -> None:
        student, teacher = _inner(student), _inner(teacher)
        names = [name for name, _, _ in iter_gates(student)]
        self._student = [student.get_submodule(name) for name in names]
        self._teacher = [_find(teacher, name) for name in names]
        self._hooks = ExitStack()

    def __enter__(self) -> "AttentionOutputs":
        for module in {id(module): module for module in (*self._student, *self._teacher)}.values():
            module._forward_hooks[_KEY] = _leave_output
            self._hooks.callback(module._forward_hooks.pop, _KEY, None)
        return self

    def __exit__(self, *error: object) -> None:
        self._hooks.close()

    def of_student(self) -> AbstractContextManager[list[torch.Tensor]]:
        """Returns a block for one forward of the student. It yields a list that is filled at its end.

        Then it has the output (B, S, features) of every module, in the order of the model. RuntimeError if one of them
        has not run.
        """
        return _collected(self._student)

    def of_teacher(self) -> AbstractContextManager[list[torch.Tensor]]:
        """As `of_student`, of the teacher."""
        return _collected(self._teacher)


@contextmanager
def _collected(modules: Sequence[nn.Module]) -> Iterator[list[torch.Tensor]]:
    found: list[torch.Tensor] = []
    _collecting.slot.content = True
    try:
        yield found
        found.extend(vars(module)[_OUTPUT] for module in modules if _OUTPUT in vars(module))
        if len(found) < len(modules):
            raise RuntimeError(f"{len(modules) - len(found)} of {len(modules)} attention modules have not run")
    finally:
        _collecting.slot.content = None
        for module in modules:
            vars(module).pop(_OUTPUT, None)


def attention_error(
    found: Sequence[torch.Tensor],
    expected: Sequence[torch.Tensor],
    weights: TokenWeights | None,
    context: ContextParallel | None,
) -> torch.Tensor:
    """Returns the mean over examples and layers of sum(w |found - expected|^2) / sum(w |expected|^2), over tokens.

    found, expected: for every layer (B, S, features), in any dtype; sums are in float32. Only found has a gradient.
    weights: w of the tokens that are here; None: 1 for every token. Tokens of weight 0 may hold anything.
    context: whose ranks have the other tokens of the same sequences; the mean of their results is that of the whole.

    Returns a tensor (). Raises ValueError for shapes that differ, and where gradients are wanted and no output has one.
    """
    if torch.is_grad_enabled() and not any(ours.requires_grad for ours in found):
        raise ValueError(
            "attention_weight needs outputs of attention with a gradient: gradient checkpointing must have "
            "use_reentrant=False"
        )
    errors, sizes = [], []
    with torch.autocast(found[0].device.type, enabled=False):
        for ours, theirs in zip(found, expected, strict=True):
            if ours.shape != theirs.shape:
                raise ValueError(
                    f"the teacher's attention must give out {tuple(ours.shape)} as the student's does, "
                    f"got {tuple(theirs.shape)}"
                )
            own = None if weights is None else weights.own.view(ours.shape[:2])
            error, size = _SquaredError.apply(ours, theirs, own)
            errors.append(error)
            sizes.append(size)
        errors, sizes = torch.stack(errors), torch.stack(sizes)
        if context is not None:
            with context.watching():
                dist.all_reduce(sizes, group=context.group)
            sizes /= context.world_size
        return (errors / sizes.clamp_min(torch.finfo(sizes.dtype).tiny)).mean()


class _SquaredError(torch.autograd.Function):
    """sum(w |found - expected|^2) and sum(w |expected|^2) of every example, both (B,). Only found has a gradient, and
    only of the first.

    found and expected are kept as they are, in bfloat16 under autocast: a difference in float32 would take twice that.
    """

    @staticmethod
    def forward(ctx, found: torch.Tensor, expected: torch.Tensor, weights: torch.Tensor | None):
        ctx.save_for_backward(found, expected, weights)
        theirs = _counted(expected, weights)
        return _sum(_counted(found, weights) - theirs, weights), _sum(theirs, weights)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor, _: torch.Tensor):
        found, expected, weights = ctx.saved_tensors
        difference = _counted(found, weights) - _counted(expected, weights)
        factor = 2 * gradient[:, None] if weights is None else 2 * gradient[:, None] * weights
        return difference.mul_(factor[..., None]).to(found.dtype), None, None


def _counted(outputs: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
    """Returns outputs (B, S, features) in float32, or float64, 0 where the weight is: padding may hold anything."""
    outputs = outputs if outputs.dtype == torch.float64 else outputs.float()
    return outputs if weights is None else outputs.masked_fill((weights <= 0)[..., None], 0)


def _sum(outputs: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
    squares = outputs.square().sum(-1)
    return squares.sum(1) if weights is None else (squares * weights).sum(1)


def _leave_output(module: nn.Module, args: tuple, output: Any) -> None:
    if _collecting.slot.content:
        setattr(module, _OUTPUT, output[0] if isinstance(output, tuple) else output)


def _inner(model: nn.Module) -> nn.Module:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _find(teacher: nn.Module, name: str) -> nn.Module:
    try:
        return teacher.get_submodule(name)
    except AttributeError:
        raise ValueError(
            f"attention_weight needs a teacher with the attention modules of the student, got {type(teacher).__name__} "
            f"without {name}: set it to 0"
        ) from None
