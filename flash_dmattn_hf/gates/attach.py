"""Puts importance gates into a model's attention modules, finds them, and takes them out again."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from flash_dmattn_hf.config import DynamicMaskConfig
from flash_dmattn_hf.gates import doge
from flash_dmattn_hf.gates.eligibility import AttentionShape, is_attention, is_native_doge, judge, read_shape
from flash_dmattn_hf.gates.importance import ImportanceGate

logger = logging.getLogger(__name__)

GATE_NAME = "dma"
"""Name of the gate inside its attention module."""


@dataclass
class AttachReport:
    """attached: names of the attention modules with a gate. skipped: name -> why it has none."""

    attached: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)


def get_gate(module: nn.Module) -> ImportanceGate | None:
    """Returns the gate of an attention module, None if it has none."""
    return getattr(module, GATE_NAME, None)


def iter_gates(model: nn.Module) -> Iterator[tuple[str, nn.Module, ImportanceGate]]:
    """Yields name, attention module and gate for every module with a gate, in the model's order."""
    for name, module in model.named_modules():
        if is_attention(module) and (gate := get_gate(module)) is not None:
            yield name, module, gate


def attach(model: nn.Module, config: DynamicMaskConfig) -> AttachReport:
    """Gives every eligible attention module of the text model a gate; existing gates stay.

    Raises ValueError if no module qualifies, or one that must have dynamic masks cannot.
    """
    report, refused = plan(model, config)
    _check_layers(model, config)
    if refused and report.attached:
        raise ValueError(refusal(model, refused))
    if not report.attached:
        raise ValueError(refusal(model, refused or report.skipped))
    num_new = install(model, config, report.attached)
    if num_new and not config.add_importance_bias:
        freeze_unused(model)
        logger.warning("add_importance_bias=False: the importance cannot be trained, its parameters are frozen")
    return report


def plan(model: nn.Module, config: DynamicMaskConfig) -> tuple[AttachReport, dict[str, str]]:
    """Returns what attaching would do, and the refused modules (name -> reason), without doing it."""
    report, refused = AttachReport(), {}
    text_config = text_config_of(model)
    for name, module, owner in _attention_modules(model):
        if getattr(module, "config", owner) is not text_config:
            report.skipped[name] = "it belongs to another part than the text model"
            continue
        verdict = judge(module, config, text_config)
        if verdict.kind == "attach":
            report.attached.append(name)
        elif verdict.kind == "native":
            report.skipped[name] = verdict.reason
        else:
            refused[name] = verdict.reason
    return report, refused


def _check_layers(model: nn.Module, config: DynamicMaskConfig) -> None:
    indices = {getattr(module, "layer_idx", None) for _, module, _ in _attention_modules(model)}
    if absent := [index for index in config.layers or () if index not in indices]:
        raise ValueError(f"layers must be indices of attention layers of {type(model).__name__}, got {absent}")


def _attention_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module, Any]]:
    """Yields name, module and the config of the innermost model around it, for every attention module."""
    owners = {"": model.config}
    for name, module in model.named_modules():
        parent = owners[name.rpartition(".")[0]] if name else model.config
        owners[name] = module.config if isinstance(module, PreTrainedModel) else parent
        if is_attention(module):
            yield name, module, parent


def install(model: nn.Module, config: DynamicMaskConfig, names: list[str]) -> int:
    """Makes the gates of the named attention modules that have none; returns how many it made."""
    num_new = 0
    for name in names:
        module = model.get_submodule(name)
        if get_gate(module) is not None:
            continue
        num_new += 1
        shape = read_shape(module)
        if is_native_doge(module):
            module.dma = doge.DogeGate(module, shape, config)
            continue
        module.add_module(GATE_NAME, _make_gate(module, shape, config))
    return num_new


def freeze_unused(model: nn.Module) -> None:
    """Freezes the gates whose importance is not added to the logits: nothing could train them."""
    for _, _, gate in iter_gates(model):
        if not gate.config.add_importance_bias and isinstance(gate, ImportanceGate):
            gate.requires_grad_(False)


def detach(model: nn.Module) -> None:
    """Removes every gate."""
    for _, module, _ in list(iter_gates(model)):
        delattr(module, GATE_NAME)


def text_config_of(model: nn.Module) -> Any:
    """Returns the config of the text decoder: the model's own, or the text part of a composite one."""
    return text_part(model.config)


def text_part(config: Any) -> Any:
    """Returns the text part of a composite config, the config itself if it has none or several."""
    try:
        return config.get_text_config()
    except ValueError:
        return config


def _make_gate(module: nn.Module, shape: AttentionShape, config: DynamicMaskConfig) -> ImportanceGate:
    # on the device and in the dtype of its neighbours
    neighbour = next((p for p in module.parameters() if p.is_floating_point()), None)
    device = torch.get_default_device() if neighbour is None else neighbour.device
    dtype = torch.get_default_dtype() if neighbour is None else neighbour.dtype
    with torch.device(device):
        gate = ImportanceGate(
            config,
            layer_idx=module.layer_idx,
            num_heads=shape.num_heads,
            num_kv_heads=shape.num_kv_heads,
            head_dim=shape.head_dim,
            sliding_window=shape.sliding_window,
            initializer_range=getattr(module.config, "initializer_range", None) or 0.02,
        ).to(dtype)
    return gate.train(module.training)


def refusal(model: nn.Module, reasons: dict[str, str]) -> str:
    """Returns the sentence that says why a model cannot be attached to; reasons: module name -> reason."""
    if not reasons:
        return f"model must have causal attention modules, got {type(model).__name__}, which has none"
    name, reason = next(iter(reasons.items()))
    more = f" (and {len(reasons) - 1} more)" if len(reasons) > 1 else ""
    return f"{type(model).__name__} cannot use flash_dmattn: {name}: {reason}{more}"
