"""Changes of a live model: what stands in its config is what runs, and no layer is dense without being meant to be."""

import weakref
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from flash_dmattn_hf.config import SECTION, DynamicMaskConfig
from flash_dmattn_hf.gates import attach
from flash_dmattn_hf.gates.attach import text_config_of
from flash_dmattn_hf.gates.eligibility import is_native_doge, judge
from flash_dmattn_hf.names import is_ours

_FIXED = ("importance_heads", "importance_input", "dt_proj_bias")
"""Settings that shape the gates' parameters."""

_native: "weakref.WeakSet[nn.Module]" = weakref.WeakSet()  # attention modules that were judged to need no gate


def follow_settings(module: PreTrainedModel) -> None:
    """Makes every forward of a model with gates begin with a look at `config.flash_dmattn`; idempotent."""
    if _follow not in module._forward_pre_hooks.values():
        module.register_forward_pre_hook(_follow)
        module._flash_dmattn_settings = _section_of(module)


def _section_of(model: PreTrainedModel) -> dict[str, Any] | None:
    """Returns a copy of the section, which may be changed in place."""
    section = getattr(text_config_of(model), SECTION, None)
    return dict(section) if isinstance(section, dict) else section


def _follow(module: PreTrainedModel, args: tuple) -> None:
    """Forward pre-hook: gives the gates the settings of the config if those have changed.

    Raises ValueError for settings that fit neither the gates nor their places.
    """
    section = getattr(text_config_of(module), SECTION, None)
    if section == module._flash_dmattn_settings or not is_ours(text_config_of(module)._attn_implementation):
        return
    if torch.compiler.is_compiling():
        raise ValueError(f"config.{SECTION} has changed: call the model once before it is compiled again")
    if section is None:
        raise ValueError(f"config.{SECTION} must hold the settings of a model with importance gates, got None")
    gates = {name: gate for name, _, gate in attach.iter_gates(module)}
    is_doge = any(map(is_native_doge, module.modules()))
    settings = DynamicMaskConfig.from_dict(section).resolve(dense=not is_doge)
    if any(gate.config != settings for gate in gates.values()):
        _check_fit(module, gates, settings)
    for gate in gates.values():
        gate.config = settings
    attach.freeze_unused(module)
    setattr(text_config_of(module), SECTION, settings.to_dict())
    module._flash_dmattn_settings = settings.to_dict()


def _check_fit(model: PreTrainedModel, gates: dict[str, Any], settings: DynamicMaskConfig) -> None:
    for gate in gates.values():
        for name in _FIXED:
            if getattr(settings, name) != getattr(gate.config, name):
                raise ValueError(
                    f"config.{SECTION}[{name!r}] of a live model must stay {getattr(gate.config, name)!r}, got "
                    f"{getattr(settings, name)!r}: it decides about the shape of the gates"
                )
    planned = attach.plan(model, settings)
    if planned.shapes.keys() != gates.keys():
        name = min(planned.shapes.keys() ^ gates.keys())
        has, needs = ("no gate", "one") if name in planned.shapes else ("a gate", "none")
        raise ValueError(
            f"config.{SECTION} of a live model must need gates where they are, but with {settings} {name}, which has "
            f"{has}, needs {needs}: save the model with its old settings and load it with the new ones"
        )


def refuse_missing_gate(module: nn.Module) -> None:
    """Raises ValueError for an attention module without a gate that should have one, such as one put in later."""
    if torch.compiler.is_compiling() or module in _native:
        return
    section = getattr(module.config, SECTION, None)
    if section is not None:
        settings = DynamicMaskConfig.from_dict(section).resolve()
        if judge(module, settings, module.config).kind == "attach":
            raise ValueError(
                f"layer {module.layer_idx} ({type(module).__name__}) must have an importance gate like the others, got "
                'none: it was put in after loading; call model.set_attn_implementation("flash_dmattn") to give it one'
            )
    _native.add(module)
