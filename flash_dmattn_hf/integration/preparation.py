"""What a model needs before it has weights: its settings, its gates, and the checks of its first forward."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from flash_dmattn_hf.config import SECTION, DynamicMaskConfig, load_time_values
from flash_dmattn_hf.gates import attach, doge
from flash_dmattn_hf.gates.attach import text_config_of
from flash_dmattn_hf.gates.eligibility import is_native_doge
from flash_dmattn_hf.integration.guards import hides_positions, refuse_packed_positions
from flash_dmattn_hf.integration.lost_settings import remember
from flash_dmattn_hf.integration.shared_keys import keep_all_tokens, slices_before_sharing
from flash_dmattn_hf.names import is_ours


def uses_dynamic_masks(model: PreTrainedModel) -> bool:
    """True if our implementation is selected for the text part of the model."""
    return is_ours(text_config_of(model)._attn_implementation)


def settings_of(model: PreTrainedModel) -> DynamicMaskConfig:
    """Returns the resolved settings: the config's section or the defaults, with load-time values on top."""
    text_config = text_config_of(model)
    is_doge = any(is_native_doge(module) for module in model.modules())
    section = getattr(text_config, SECTION, None)
    if section is None:
        base = doge.native_config(text_config) if is_doge else DynamicMaskConfig()
    else:
        base = DynamicMaskConfig.from_dict(section)
    if values := load_time_values():
        base = base.updated(values)
    return base.resolve(dense=not is_doge)


def prepare(model: PreTrainedModel, previous: dict[int, str] | None = None) -> None:
    """Attaches gates if our implementation or a section asks for them; idempotent.

    previous: id of a config -> the implementation its parts go back to when they cannot use ours.
    """
    text_config = text_config_of(model)
    is_selected = is_ours(text_config._attn_implementation)
    if not is_selected and getattr(text_config, SECTION, None) is None:
        return
    planned = attach.plan(model, settings_of(model))
    if not planned.shapes:
        if is_selected:
            model._flash_dmattn_refusal = attach.refusal(model, planned)
            if refuse_without_gates not in model._forward_pre_hooks.values():
                model.register_forward_pre_hook(refuse_without_gates)
        return
    attach.attach(model, planned)
    remember(model)
    is_doge = any(map(is_native_doge, model.modules()))
    has_settings = bool(load_time_values()) or getattr(text_config, SECTION, None) is not None
    if not is_doge or has_settings:
        model._flash_dmattn_has_default_settings = not has_settings
        setattr(text_config, SECTION, planned.config.to_dict())
    _hand_back(model, text_config, previous or {})
    _watch_first_forward(model)


def refuse_without_gates(module: nn.Module, args: tuple) -> None:
    """Forward pre-hook of a model in which nothing qualified: raises instead of attending densely."""
    if uses_dynamic_masks(module):
        raise ValueError(module._flash_dmattn_refusal)


def check_called(module: nn.Module, args: tuple, output: Any) -> None:
    """Forward hook, once: raises if an attached attention module was not called through the interface."""
    if torch.compiler.is_compiling() or not uses_dynamic_masks(module):
        return
    if module.training and getattr(text_config_of(module), "layerdrop", 0):
        return
    attach.check_layers(module)
    for name, _, gate in attach.iter_gates(module):
        if not gate.was_called:
            raise RuntimeError(
                f"{name} of {type(module).__name__} has a gate but its forward never called the attention "
                "interface, so it is silently dense: leave its layer out with layers=..."
            )
    remove_hook(module._forward_hooks, check_called)


def choose_for_text_part(config: Any, name: str) -> None:
    """Chooses our implementation for the text part of a composite model that got it, if nothing is chosen there."""
    text_config = attach.text_part(config)
    if text_config._attn_implementation is None:
        text_config._attn_implementation = name


def name_text_part(config: Any, attn_implementation: Any) -> Any:
    """Returns a choice by parts, in which ours for the whole, the name "", is ours for the text part as well."""
    if not isinstance(attn_implementation, dict) or not is_ours(attn_implementation.get("")):
        return attn_implementation
    text_config = attach.text_part(config)
    parts = [key for key in config.sub_configs if attach.text_part(getattr(config, key, None)) is text_config]
    return {**{key: attn_implementation[""] for key in parts}, **attn_implementation}


def leave_other_parts_native(config: Any) -> None:
    """Lets the parts of a composite model around the text model, such as a vision tower, choose for themselves."""
    for part in _other_parts_with_ours(config):
        part._attn_implementation = None


def _other_parts_with_ours(config: Any) -> list[Any]:
    text_config = attach.text_part(config)
    parts = [getattr(config, key, None) for key in config.sub_configs]
    parts = [part for part in parts if part is not None and attach.text_part(part) is not text_config]
    return [part for part in parts if is_ours(part._attn_implementation)]


def _watch_first_forward(model: nn.Module) -> None:
    parts = [part for part in submodels(model) if any(True for _ in attach.iter_gates(part))]
    if not any(check_called in part._forward_hooks.values() for part in parts):
        parts[-1].register_forward_hook(check_called)
    for part in parts:
        if hides_positions(type(part)) and refuse_packed_positions not in part._forward_pre_hooks.values():
            part.register_forward_pre_hook(refuse_packed_positions, with_kwargs=True)
        if slices_before_sharing(type(part)) and keep_all_tokens not in part._forward_pre_hooks.values():
            part.register_forward_pre_hook(keep_all_tokens, with_kwargs=True)


def _hand_back(model: PreTrainedModel, text_config: Any, previous: dict[int, str]) -> None:
    """Gives parts other than the text model, such as a vision tower, an implementation of their own."""
    for part in submodels(model):
        remove_hook(part._forward_pre_hooks, refuse_without_gates)
        has_gates = any(True for _ in attach.iter_gates(part))
        if part.config is not text_config and is_ours(part.config._attn_implementation) and not has_gates:
            name = previous.get(id(part.config))
            name = None if is_ours(name) else name
            part.config._attn_implementation_internal = part.get_correct_attn_implementation(name, True)
    models = {id(part.config) for part in submodels(model)}
    for config in _other_parts_with_ours(model.config):  # towers that are no models of their own (Idefics)
        if id(config) not in models:
            config._attn_implementation_internal = model.get_correct_attn_implementation(None, True)


def submodels(model: nn.Module) -> list[PreTrainedModel]:
    """Returns the model and the models inside it, outermost first."""
    return [module for module in model.modules() if isinstance(module, PreTrainedModel)]


def remove_hook(hooks: dict, function: Callable) -> None:
    """Takes a function out of a module's dict of hooks."""
    for key, hook in list(hooks.items()):  # other threads may run the model, and take it out as well
        if hook is function:
            hooks.pop(key, None)
