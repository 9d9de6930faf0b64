"""All attention layers of a text model have its one config: which settings and which implementation run is read there.

A layer that was copied by itself, or taken from another model, comes with a config of its own.
"""

from typing import Any

from torch import nn

from flash_dmattn_hf.config import SECTION, DynamicMaskConfig
from flash_dmattn_hf.gates.importance import get_gate, parts_of
from flash_dmattn_hf.names import NAMES


def is_of_text_part(module: nn.Module, owner: Any, text_config: Any) -> bool:
    """Whether an attention module belongs to the text model, by its config or by the place where it is.

    owner: the config of the innermost model around it.
    """
    config = getattr(module, "config", owner)
    return config is text_config or (owner is text_config and type(config) is type(text_config))


def adopt(module: nn.Module, text_config: Any) -> None:
    """Has an attention module of the text model, and its gate, read the config of that."""
    if getattr(module, "config", text_config) is not text_config:
        module.config = text_config
    for part in parts_of(get_gate(module)):
        part.model_config = text_config


def check_one_config(name: str, module: nn.Module, text_config: Any) -> None:
    """Raises ValueError if a module with a gate has other settings, or another implementation, than its model."""
    if module.config is text_config:
        return
    is_dense = get_gate(module).starts_dense
    mine, expected = _choices(module.config, is_dense), _choices(text_config, is_dense)
    if mine != expected:
        different = [key for key in {**expected, **mine} if mine.get(key) != expected.get(key)]
        wanted, found = ({key: choices.get(key) for key in different} for choices in (expected, mine))
        raise ValueError(
            f"{name} must have {wanted}, as the config of its model says, got {found} from a config of its own: call "
            f'model.set_attn_implementation("{NAMES[0]}"), which gives all layers that of the model'
        )


def _choices(config: Any, is_dense: bool) -> dict[str, Any]:
    """Returns what decides how a layer runs, the settings that a section leaves out included."""
    section = getattr(config, SECTION, None)
    settings = {} if section is None else DynamicMaskConfig.from_dict(section).resolve(dense=is_dense).to_dict()
    return {"attn_implementation": config._attn_implementation, **settings}
