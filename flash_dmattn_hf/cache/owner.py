"""The model that a cache is made for: where it is, and which of its layers have gates."""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from flash_dmattn_hf.gates.attach import check_layers, iter_gates
from flash_dmattn_hf.gates.wrapped import find_pretrained


def model_within(wrapped: nn.Module) -> PreTrainedModel:
    """Returns the outermost model of transformers in a module. ValueError if it is, or holds, none."""
    model = find_pretrained(wrapped)
    if model is None:
        raise ValueError(f"model must be a model of transformers, got {type(wrapped).__name__}")
    return model


def check_token_dtype(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Raises ValueError if a model computes no tokens of this dtype. One in float32 may: autocast rounds to 16 bits."""
    weights = {weight.dtype for weight in model.parameters() if weight.is_floating_point()}
    weights = {found for found in weights if found.itemsize > 1}  # 8 bits are how quantized ones are stored
    rounds = torch.float32 in weights and dtype.itemsize == 2
    if weights and dtype not in weights and not rounds:
        names = ", ".join(sorted(map(str, weights)))
        raise ValueError(f"state must hold tokens of the model's dtype, {names}, got {dtype}: make it anew")


def gates_by_index(model: PreTrainedModel) -> dict[int, Any]:
    """Returns layer_idx -> gate. ValueError if there is none, or a cache cannot tell the layers apart.

    Also raises what `check_layers` does.
    """
    check_layers(model)
    names, gates = {}, {}
    for name, _, gate in iter_gates(model):
        index = gate.layer_idx
        if index in gates:
            raise ValueError(
                f"every layer of model must have a layer_idx of its own, got {index} for {names[index]} and "
                f"{name}: number them anew"
            )
        names[index], gates[index] = name, gate
    if not gates:
        raise ValueError(
            f"model must have flash_dmattn attached, got a {type(model).__name__} without an importance gate"
        )
    for name, layers in model.named_modules():
        if isinstance(layers, nn.ModuleList) and len(set(layers)) < len(layers) and any(iter_gates(layers)):
            raise ValueError(f"{name} of model must not hold a module twice: put in a copy.deepcopy of it")
    return gates
