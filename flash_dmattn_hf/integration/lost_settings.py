"""Settings given at load time are lost when a library loads the path of a model once more, as a reference for it."""

import threading
import warnings
import weakref
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from flash_dmattn_hf.config import SECTION, DynamicMaskConfig
from flash_dmattn_hf.gates.attach import text_config_of, text_part
from flash_dmattn_hf.names import NAMES

_models: "weakref.WeakSet[PreTrainedModel]" = weakref.WeakSet()
"""Models with dynamic masks that are in use."""
_lock = threading.Lock()


def remember(model: PreTrainedModel) -> None:
    """Notes a model with dynamic masks, for as long as it lives."""
    with _lock:
        _models.add(model)


def warn_if_lost(model: PreTrainedModel, config: Any = None) -> None:
    """Warns when a model, loaded without settings, runs with others than one from the same path that is in use.

    config: with which it was loaded, if any. One whose settings are not those of the path was given them on purpose.
    """
    path, section = model.name_or_path, getattr(text_config_of(model), SECTION, None)
    with _lock:
        others = [getattr(text_config_of(other), SECTION, None) for other in _models if other.name_or_path == path]
    if section is None or not path:
        return
    mine = DynamicMaskConfig.from_dict(section).to_values()
    settings = [DynamicMaskConfig.from_dict(other) for other in others if other is not None]
    given = next((other for other in settings if other.to_values() != mine), None)
    if given is None or _are_given(config, path):
        return
    wanted, theirs = given.chosen(), given.to_values()
    got = {name: value for name, value in mine.items() if theirs[name] != value}
    kwargs = f'{{"attn_implementation": "{NAMES[0]}", "{SECTION}": {wanted}}}'
    warnings.warn(
        f"{path} is in use with {SECTION}={wanted}, and was loaded once more with {got}: give the same settings again. "
        f"Trainers of TRL that load a reference model take them in their config, as model_init_kwargs={kwargs}",
        stacklevel=4,
    )


def _are_given(config: Any, path: str) -> bool:
    """Whether a config has settings that do not come from the path; auto classes pass the config of the path too."""
    section = getattr(text_part(config), SECTION, None) if isinstance(config, PreTrainedConfig) else None
    if section is None:
        return False
    try:
        saved, _ = PreTrainedConfig.get_config_dict(path)
    except OSError:
        return True
    return section not in (part.get(SECTION) for part in (saved, *saved.values()) if isinstance(part, dict))
