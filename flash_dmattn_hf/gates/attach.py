"""Puts importance gates into a model's attention modules, finds them, and takes them out again."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from flash_dmattn_hf.config import DynamicMaskConfig
from flash_dmattn_hf.gates import doge
from flash_dmattn_hf.gates.eligibility import AttentionShape, is_attention, is_native_doge, judge
from flash_dmattn_hf.gates.hidden_states import offer_hidden_states, stop_offering
from flash_dmattn_hf.gates.importance import ImportanceGate, get_gate
from flash_dmattn_hf.gates.one_config import adopt, check_one_config, is_of_text_part
from flash_dmattn_hf.names import GATE_NAME, NAMES

logger = logging.getLogger(__name__)


_OTHER_PART = "it belongs to another part than the text model"


@dataclass
class AttachReport:
    """attached: names of the attention modules with a gate. skipped: name -> why it has none."""

    attached: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)


def iter_gates(model: nn.Module) -> Iterator[tuple[str, nn.Module, ImportanceGate]]:
    """Yields name, attention module and gate for every module with a gate, in the model's order.

    model: a model of transformers, or what holds one, such as PEFT's, compiled, DDP's and FSDP's models.
    """
    for name, module in model.named_modules():
        if is_attention(module) and (gate := get_gate(module)) is not None:
            yield name, module, gate


@dataclass
class AttachPlan:
    """What attaching will do to a model, decided once.

    config: resolved settings. shapes: name of an attention module that gets or has a gate -> its shape.
    skipped: name -> why it keeps its own attention. refused: name -> why dynamic masks would be wrong there; the
    name is empty for the whole model.
    """

    config: DynamicMaskConfig
    shapes: dict[str, AttentionShape] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)


def plan(model: nn.Module, config: DynamicMaskConfig) -> AttachPlan:
    """Judges every attention module of a model; changes nothing."""
    if getattr(model.config, "is_encoder_decoder", False):
        reason = "it is an encoder-decoder, and only decoder-only models have dynamic masks"
        return AttachPlan(config, refused={"": reason})
    result = AttachPlan(config)
    text_config = text_config_of(model)
    for name, module, owner in attention_modules(model):
        if not is_of_text_part(module, owner, text_config):
            result.skipped[name] = _OTHER_PART
            continue
        verdict = judge(module, config, text_config)
        if verdict.kind == "attach":
            result.shapes[name] = verdict.shape
        else:
            reasons = result.skipped if verdict.kind == "native" else result.refused
            reasons[name] = verdict.reason
    return result


def attach(model: nn.Module, planned: AttachPlan) -> AttachReport:
    """Gives every attention module of a plan for this model a gate; existing gates stay.

    Raises ValueError if no module qualifies, one that must have dynamic masks cannot, a layer does not exist, one with
    a window of its own gets no gate, or if tensor parallelism has split the model already.
    """
    _check_layers(model, planned.config)
    if planned.refused or not planned.shapes:
        raise ValueError(refusal(model, planned))
    check_shares(model, planned)
    lacking = [name for name in planned.shapes if get_gate(model.get_submodule(name)) is None]
    if lacking and (num_ranks := tensor_parallel_size(model)) > 1:
        raise ValueError(
            f"{type(model).__name__} is split over {num_ranks} ranks already, which leaves its gates out: load it with "
            f'attn_implementation="{NAMES[0]}"'
        )
    adopt_layers(model)
    for name in lacking:
        _install(model.get_submodule(name), planned.shapes[name], planned.config)
    if lacking and not planned.config.add_importance_bias:
        freeze_unused(model)
        logger.warning(
            "add_importance_bias=False: the importance is frozen, except in a soft selection, as distillation makes one"
        )
    return AttachReport(list(planned.shapes), planned.skipped)


def check_layers(model: nn.Module) -> None:
    """Raises ValueError if a layer with a gate has other settings, or another implementation, than its text model."""
    text_config = text_config_of(model)
    for name, module, _ in iter_gates(model):
        check_one_config(name, module, text_config)


def adopt_layers(model: nn.Module) -> None:
    """Has all attention layers of the text model, and their gates, read its one config."""
    text_config = text_config_of(model)
    for _, module, owner in attention_modules(model):
        if is_of_text_part(module, owner, text_config):
            adopt(module, text_config)


def tensor_parallel_size(model: nn.Module) -> int:
    """Returns over how many ranks tensor parallelism has split the layers of a model; 1 before it is split."""
    return getattr(model, "_tp_size", None) or 1


def _check_layers(model: nn.Module, config: DynamicMaskConfig) -> None:
    indices = {getattr(module, "layer_idx", None) for _, module, _ in attention_modules(model)}
    if absent := [index for index in config.layers or () if index not in indices]:
        raise ValueError(f"layers must be indices of attention layers of {type(model).__name__}, got {absent}")


def check_shares(model: nn.Module, planned: AttachPlan) -> None:
    """Raises ValueError if a plan for this model leaves a layer of window_shares without a gate."""
    with_gate = {model.get_submodule(name).layer_idx for name in planned.shapes}
    absent = next((layer for layer in planned.config.window_shares or () if layer not in with_gate), None)
    if absent is None:
        return
    reasons = (
        reason
        for name, reason in planned.skipped.items()
        if reason != _OTHER_PART and getattr(model.get_submodule(name), "layer_idx", None) == absent
    )
    why = next(reasons, f"{type(model).__name__} has no attention with this index")
    raise ValueError(f"window_shares must name layers with an importance gate, got layer {absent}: {why}")


def attention_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module, Any]]:
    """Yields name, module and the config of the innermost model around it, for every attention module."""
    owners = {"": model.config}
    for name, module in model.named_modules():
        parent = owners[name.rpartition(".")[0]] if name else model.config
        owners[name] = module.config if isinstance(module, PreTrainedModel) else parent
        if is_attention(module):
            yield name, module, parent


def _install(module: nn.Module, shape: AttentionShape, config: DynamicMaskConfig) -> None:
    if is_native_doge(module):
        module.dma = doge.DogeGate(module, shape, config)
        return
    with torch.device(_device_of(module)):
        gate = _make_gate(module, shape, config).to(_dtype_of(module))
    module.add_module(GATE_NAME, gate.train(module.training))
    if config.importance_input == "hidden":
        offer_hidden_states(module)


def _device_of(module: nn.Module) -> torch.device:
    """Returns where a module computes: where its weights are, or are brought if they are offloaded."""
    hooks = (getattr(part, "_hf_hook", None) for part in module.modules())
    brought = next((place for hook in hooks if (place := getattr(hook, "execution_device", None)) is not None), None)
    weights = next(chain(module.parameters(), module.buffers()), None)  # some quantizers make buffers of weights
    return torch.device(brought) if brought is not None else getattr(weights, "device", torch.get_default_device())


def _dtype_of(module: nn.Module) -> torch.dtype:
    """Returns the dtype that a module's weights are trained in; quantized ones are integers or have 8 bits."""
    weights = (p.dtype for p in module.parameters() if p.is_floating_point() and p.dtype.itemsize > 1)
    configured = getattr(module.config, "dtype", None)
    return next(weights, configured if isinstance(configured, torch.dtype) else torch.get_default_dtype())


def freeze_unused(model: nn.Module) -> None:
    """Freezes the gates whose importance is not added to the logits: only a soft selection can train them."""
    for _, _, gate in iter_gates(model):
        if not gate.config.add_importance_bias and isinstance(gate, ImportanceGate):
            gate.requires_grad_(False)


def detach(model: nn.Module) -> None:
    """Removes every gate."""
    for _, module, _ in list(iter_gates(model)):
        delattr(module, GATE_NAME)
        stop_offering(module)


def text_config_of(model: nn.Module) -> Any:
    """Returns the config of the text decoder: the model's own, or the text part of a composite one."""
    return text_part(model.config)


def num_decoder_layers(model: nn.Module) -> int:
    """Returns how many layers the text decoder has. num_hidden_layers of BART and its kin counts an encoder's."""
    config = text_config_of(model)
    return getattr(config, "decoder_layers", None) or config.num_hidden_layers


def text_part(config: Any) -> Any:
    """Returns the text part of a composite config, the config itself if it has none or several."""
    try:
        return config.get_text_config()
    except ValueError:
        return config


def parameter_shapes(model: nn.Module, planned: AttachPlan) -> dict[int, dict[str, tuple[int, ...]]]:
    """Returns layer_idx -> name of a gate's parameter -> its shape, for all gates of a plan for this model."""
    result = {}
    for name, shape in planned.shapes.items():
        with torch.device("meta"):
            gate = _make_gate(model.get_submodule(name), shape, planned.config)
        result[gate.layer_idx] = {name: tuple(parameter.shape) for name, parameter in gate.named_parameters()}
    return result


def _make_gate(module: nn.Module, shape: AttentionShape, config: DynamicMaskConfig) -> ImportanceGate:
    return ImportanceGate(
        config,
        model_config=module.config,
        layer_idx=module.layer_idx,
        num_heads=shape.num_heads,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        hidden_size=shape.hidden_size,
        sliding_window=shape.sliding_window,
        is_latent=shape.is_latent,
        initializer_range=getattr(module.config, "initializer_range", None) or 0.02,
    )


def refusal(model: nn.Module, planned: AttachPlan) -> str:
    """Returns the sentence that says why a model cannot be attached to; of its text model, if that has attention."""
    reasons = planned.refused or {name: reason for name, reason in planned.skipped.items() if reason != _OTHER_PART}
    if not reasons and planned.skipped:
        config = text_config_of(model)
        says = "does not say which of its parts is the text model" if config is model.config else "is of the text model"
        return (
            f"{type(model).__name__} cannot use flash_dmattn: its {type(config).__name__} {says}, and none of its "
            "attention modules has that config itself"
        )
    if not reasons:
        return f"model must have causal attention modules, got {type(model).__name__}, which has none"
    name, reason = next(iter(reasons.items()))
    more = f" (and {len(reasons) - 1} more)" if len(reasons) > 1 else ""
    place = f"{name}: " if name else ""
    return f"{type(model).__name__} cannot use flash_dmattn: {place}{reason}{more}"
