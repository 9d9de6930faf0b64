"""An attention module that came into a converted model later has no gate: it must not be dense without saying so."""

import copy
import weakref
from typing import Any

import torch
from torch import nn

from flash_dmattn_hf.config import SECTION, DynamicMaskConfig
from flash_dmattn_hf.gates.eligibility import judge

_judged: "weakref.WeakKeyDictionary[nn.Module, Any]" = weakref.WeakKeyDictionary()
"""Attention modules that need no gate, and the settings with which that was so."""


def refuse_missing_gate(module: nn.Module) -> None:
    """Raises ValueError for an attention module without a gate that should have one by its config's settings."""
    if torch.compiler.is_compiling():
        return
    section = getattr(module.config, SECTION, None)
    if section is None or _judged.get(module) == section:
        return
    settings = DynamicMaskConfig.from_dict(section).resolve()
    verdict = judge(module, settings, module.config)
    if getattr(module, "layer_idx", None) in (settings.window_shares or ()) and verdict.kind != "attach":
        raise ValueError(
            f"window_shares must name layers with an importance gate, got layer {module.layer_idx}: {verdict.reason}"
        )
    if verdict.kind == "attach":
        raise ValueError(
            f"layer {module.layer_idx} ({type(module).__name__}) must have an importance gate with these settings, got "
            'none: model.set_attn_implementation("flash_dmattn") gives one to modules that came later'
        )
    _judged[module] = copy.deepcopy(section)
