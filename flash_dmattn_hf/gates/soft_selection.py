"""Soft selection in models: the cut of the selection gets a slope, so that training moves keys across it.

The setting is one object to which the gates of a model refer. It therefore holds in every thread that runs the model,
and in those in which autograd computes checkpointed layers a second time. No config, state dict, copy or pickle has it.
"""

import math
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from flash_dmattn_hf.gates.attach import iter_gates
from flash_dmattn_hf.gates.divided import is_divided
from flash_dmattn_hf.gates.importance import Gate, ImportanceGate
from flash_dmattn_hf.names import NAMES, is_ours
from flash_dmattn_hf.thread_slot import ThreadSlot

_GRADIENT_REDUCERS = ("DistributedDataParallel", "FullyShardedDataParallel", "DeepSpeedEngine")
_lock = threading.Lock()
_is_suspended = ThreadSlot()


def soft_selection(model: nn.Module, *, temperature: float, band: float | None = 1.5) -> "SoftSelection":
    """Returns a context manager inside which every forward of `model` without a DynamicMaskCache selects softly.

    `flash_dmattn.soft_selection` has the equation. What follows from it here:

    - Train and eval mode do the same. `generate()`, and any forward over a DynamicMaskCache, keep the hard mask.
    - The backward belongs inside as well: gradient checkpointing computes layers again, with the setting of that time.
    - With a temperature the importance has a gradient even if it is not added to the logits. A model with
      `add_importance_bias=False` has it frozen; it is trainable inside and frozen again afterwards. So make the
      optimizer inside, and wrap the model for several processes inside.
    - Blocks nest; the innermost counts. The setting is that of the model, whichever thread has entered it.

    model: a model with dynamic masks, or anything around one: PEFT, torch.compile, DistributedDataParallel.
    temperature: above 0, in standard deviations of the importance; as it falls the selection becomes the hard mask.
        It can be changed at any time as `.temperature` of what is returned.
    band: at least 1: how many contested keys a query sees, in multiples of those it keeps; None: all.

    Raises ValueError for other numbers, and on entry for a model without dynamic masks, or one whose frozen importance
    is already in the hands of data parallelism.
    """
    return SoftSelection(model, temperature, band)


class SoftSelection:
    """A soft selection of one model, from `soft_selection`: active inside a `with` block.

    temperature: of the cut; every forward and recomputation reads it anew. band: how many contested keys are seen.
    """

    def __init__(self, model: nn.Module, temperature: float, band: float | None) -> None:
        if band is not None and not 1 <= band < math.inf:
            raise ValueError(f"band must be None or at least 1, got {band}")
        self._model, self.band = model, band
        self.temperature = temperature
        self._gates: list[Gate] = []
        self._thawed: list[tuple[ImportanceGate, str]] = []
        self._witness: _Witness | None = None

    @property
    def temperature(self) -> float:
        return self.as_tensor.item()

    @temperature.setter
    def temperature(self, temperature: float) -> None:
        if not 0 < temperature < math.inf:
            raise ValueError(f"temperature must be above 0, got {temperature}")
        # A tensor, because torch.compile would compile anew for every other number.
        self.as_tensor = torch.tensor(temperature, dtype=torch.float64, device="cpu")

    def __enter__(self) -> "SoftSelection":
        found = _gates_of(self._model)
        gates = [gate for gate, _ in found]
        with _lock:
            if self._gates:
                raise RuntimeError("this soft selection is active already: make another one to nest them")
            thawed = [(gate, name) for gate, is_own in found if is_own for name in _frozen(gate)]
            _refuse_parallel(self._model, thawed)
            self._gates, self._thawed = gates, thawed
            for gate, name in thawed:
                gate.get_parameter(name).requires_grad_(True)
            for gate in gates:
                gate.soft_selections = (*gate.soft_selections, self)
            watched = next((entry for entry in thawed if _can_be_watched(entry[0].get_parameter(entry[1]))), None)
            self._witness = None if watched is None else _Witness(*watched)
        return self

    def __exit__(self, kind: type | None, *_: Any) -> None:
        with _lock:
            for gate in self._gates:
                gate.soft_selections = tuple(other for other in gate.soft_selections if other is not self)
            heir = next((other for gate in self._gates for other in gate.soft_selections), None)
            if heir is not None:  # another thread has entered since, and needs what this one has thawed
                heir._thawed += self._thawed
            else:
                for gate, name in self._thawed:
                    gate.get_parameter(name).requires_grad_(False)
            self._gates, self._thawed = [], []
        if self._witness is not None and self._witness.leave() and kind is None:
            warnings.warn(
                "the importance had a gradient inside soft_selection, but nothing has changed it: it was frozen "
                "before, so make the optimizer, and its parameter groups, inside the block",
                stacklevel=2,
            )
        self._witness = None


def _can_be_watched(parameter: torch.Tensor) -> bool:
    return not (parameter.is_meta or is_divided(parameter))


class _Witness:
    """Notices whether a parameter gets gradients that no optimizer uses."""

    def __init__(self, gate: ImportanceGate, name: str) -> None:
        self._gate, self._name = gate, name
        parameter = gate.get_parameter(name)
        self._before, self._has_gradient = parameter.detach().cpu().clone(), False
        self._handle = parameter.register_post_accumulate_grad_hook(self._see)

    def _see(self, parameter: torch.Tensor) -> None:
        self._has_gradient = self._has_gradient or bool(parameter.grad.any())

    def leave(self) -> bool:
        """Ends watching; returns whether there were gradients, and the parameter is as it was."""
        self._handle.remove()
        return self._has_gradient and torch.equal(self._gate.get_parameter(self._name).detach().cpu(), self._before)


def soft_options(gate: Gate) -> dict[str, Any]:
    """Returns what the innermost of a gate's soft selections adds to the arguments of `dynamic_mask_attention`."""
    if _is_suspended.slot.content:
        return {}
    innermost = gate.soft_selections[-1]
    return {"selection_temperature": innermost.as_tensor, "selection_band": innermost.band}


@contextmanager
def hard_selection() -> Iterator[None]:
    """Inside the block the forwards of this thread have the hard mask, whatever soft selection is active.

    For forwards without gradients: autograd may compute checkpointed layers again in another thread.
    """
    slot = _is_suspended.slot
    before, slot.content = slot.content, True
    try:
        yield
    finally:
        slot.content = before


def wrap_generate(original: Callable) -> Callable:
    """Returns GenerationMixin.generate with the hard mask, with or without a cache."""

    @wraps(original)
    def generate(self, *args, **kwargs):
        with hard_selection():
            return original(self, *args, **kwargs)

    return generate


def _gates_of(model: nn.Module) -> list[tuple[Gate, bool]]:
    """Returns every gate of a model, with those that PEFT keeps beside them, and whether its layer has it as it is."""
    found = list(iter_gates(model))
    if not found:
        raise ValueError(f"model must have dynamic masks, got {type(model).__name__} without any")
    names = {module.config._attn_implementation for _, module, _ in found}
    if not any(map(is_ours, names)):
        raise ValueError(f'model must use attn_implementation="{NAMES[0]}", got "{names.pop()}"')
    own = {id(gate): gate for _, _, gate in found if isinstance(gate, Gate)}
    copies = [gate for gate in model.modules() if isinstance(gate, ImportanceGate) and id(gate) not in own]
    return [(gate, True) for gate in own.values()] + [(gate, False) for gate in copies]


def _frozen(gate: Gate) -> list[str]:
    """Returns the names of a gate's parameters that were frozen because only a soft selection can train them."""
    if gate.config.add_importance_bias or not isinstance(gate, ImportanceGate):
        return []
    return [name for name, parameter in gate.named_parameters() if not parameter.requires_grad]


def _refuse_parallel(model: nn.Module, thawed: list[tuple[ImportanceGate, str]]) -> None:
    if thawed and any(map(_reduces_gradients, model.modules())):
        raise ValueError(
            f"{type(model).__name__} has a frozen importance (add_importance_bias=False), whose gradients its "
            "processes would not share: enter soft_selection before the model is wrapped for several processes"
        )


def _reduces_gradients(module: nn.Module) -> bool:
    """Whether a module is a wrapper that decided when it was made which gradients its processes share."""
    return isinstance(module, FSDPModule) or type(module).__name__ in _GRADIENT_REDUCERS
