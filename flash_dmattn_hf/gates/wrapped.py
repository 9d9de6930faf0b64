"""Finds the model of transformers in whatever holds one: PEFT's, compiled, DDP's and FSDP's modules."""

from torch import nn
from transformers import PreTrainedModel


def find_pretrained(model: nn.Module) -> PreTrainedModel | None:
    """Returns the outermost model of transformers in a module, which may be itself; None if it holds none."""
    parts = model.modules() if isinstance(model, nn.Module) else ()
    return next((part for part in parts if isinstance(part, PreTrainedModel)), None)
