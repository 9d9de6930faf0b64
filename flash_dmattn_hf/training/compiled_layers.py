"""Compiling the layers of a model one by one: layers of one kind share what is compiled, in seconds, not minutes."""

from collections.abc import Iterator
from contextlib import contextmanager

import transformers
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from flash_dmattn_hf.gates.attach import iter_gates
from flash_dmattn_hf.gates.importance import numbers_compared

BACKEND = "inductor"
"""Of torch.compile."""


def check_checkpointing() -> None:
    """Raises ImportError if transformers checkpoints around a compiled layer, whose second run would differ."""
    if "__call__" in vars(GradientCheckpointingLayer):
        raise ImportError(
            "compiled layers with gradient checkpointing need a transformers whose layers checkpoint inside of their "
            f"forward, such as 5.23, got {transformers.__version__}: leave one of the two out"
        )


@contextmanager
def compiled_layers(*models: nn.Module) -> Iterator[list[nn.Module]]:
    """Inside the block torch.compile runs every decoder layer with a gate; yields these layers.

    In place: names of modules and parameters stay, and so does what is saved. Compiled once for each different layer
    and mode (soft, hard or dense; with or without gradients), as forwards ask for it. A model may be given twice; one
    without gates has no such layers. Layers that are compiled already are left alone.
    """
    layers = [layer for model in models for layer in _layers_of(model)]
    layers = [layer for layer in dict.fromkeys(layers) if layer._compiled_call_impl is None]
    before, numbers_compared.slot.content = numbers_compared.slot.content, True  # by iter_gates
    try:
        for layer in layers:
            # dynamic=False: all stretches have one length, and dynamic shapes make slower code.
            layer.compile(backend=BACKEND, dynamic=False)
        yield layers
    finally:
        numbers_compared.slot.content = before
        for layer in layers:
            layer._compiled_call_impl = None


def _layers_of(model: nn.Module) -> list[nn.Module]:
    modules = {id(module) for _, module, _ in iter_gates(model)}
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    return [layer for layer in layers if any(id(module) in modules for module in layer.modules())]
