"""The teacher of a distillation: the same model with dense attention, under weights that do not move."""

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn

from flash_dmattn_hf.conversion.variants import dense_switch
from flash_dmattn_hf.evaluation.final_states import evaluating
from flash_dmattn_hf.gates.attach import text_config_of
from flash_dmattn_hf.integration.uncompiled import uncompiled
from flash_dmattn_hf.names import is_ours
from flash_dmattn_hf.parallel.context import active
from flash_dmattn_hf.training.deferred_logits import DeferredLogits, check_output_layer_of, deferred_logits


class Teacher:
    """A model that is run without gradients and in eval mode.

    model: that is run. mode: a context manager inside which it is the teacher, such as with dense attention.
    is_student: whether it is the model that trains. Then it runs its own code, not what torch.compile has made of it,
        unless `runs_compiled` is set: what `compiled_layers` makes is right for both.
    """

    def __init__(
        self, model: nn.Module, mode: Callable[[], AbstractContextManager], *, is_student: bool = False
    ) -> None:
        self.model, self.mode, self.is_student = model, mode, is_student
        self.runs_compiled = False

    def logits(self, inputs: dict[str, Any]) -> DeferredLogits:
        """Returns the deferred logits (B, S, vocabulary) of the model for these keyword arguments."""
        # Another model, or the attention in it, may be compiled for itself: FlexAttention is slow without it.
        code = uncompiled(self.model) if self.is_student and not self.runs_compiled else nullcontext()
        with self.mode(), evaluating(self.model), deferred_logits(self.model), code:
            return self.model(**inputs, use_cache=False).logits

    def follow(self, student: nn.Module) -> None:
        """Runs the student as the Trainer has prepared it, if the student is the teacher.

        FSDP2 shards what torch.compile has made of a model, and needs the forward of that.
        """
        if self.is_student:
            self.model = student


def make_teacher(
    student: nn.Module,
    given: nn.Module | None,
    *,
    trains_backbone: bool,
    dtype: torch.dtype | None,
    device: torch.device | None = None,
) -> Teacher:
    """Returns the teacher of a converted model.

    given: a model with the student's vocabulary; None: the student itself with its adapter off if it is a PeftModel, or
        if its backbone is frozen; a frozen copy of it otherwise.
    dtype, device: of the copy; None: the student's. Nothing shards the copy: every process has all of it.
    Raises ValueError for another vocabulary.
    """
    if given is not None:
        _check_vocabulary(student, given)
        given.requires_grad_(False)
        uses_masks = is_ours(text_config_of(given)._attn_implementation)
        densely = dense_switch(given)
        return Teacher(given, lambda: densely() if uses_masks or active.slot.content else nullcontext())
    if hasattr(student, "disable_adapter"):
        switch = dense_switch(student.get_base_model())
        return Teacher(student, partial(_without_adapter, student, switch), is_student=True)
    if not trains_backbone:
        return Teacher(student, dense_switch(student), is_student=True)
    frozen = copy.deepcopy(student).requires_grad_(False)
    if dtype is not None:
        cast_parameters(frozen, dtype)
    if device is not None:
        frozen.to(device)
    return Teacher(frozen, dense_switch(frozen))


def cast_parameters(model: nn.Module, dtype: torch.dtype) -> None:
    """Casts a model's weights, but not its buffers: rotary frequencies would lose too much."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)


@contextmanager
def _without_adapter(model: nn.Module, densely: Callable[[], AbstractContextManager]) -> Iterator[None]:
    with densely(), model.disable_adapter():
        yield


def _check_vocabulary(student: nn.Module, teacher: nn.Module) -> None:
    student = student.get_base_model() if hasattr(student, "get_base_model") else student
    teacher = teacher.get_base_model() if hasattr(teacher, "get_base_model") else teacher
    sizes = [check_output_layer_of(model).weight.shape[0] for model in (student, teacher)]
    if sizes[0] != sizes[1]:
        raise ValueError(f"teacher must have the student's vocabulary of {sizes[0]} words, got {sizes[1]}")
