"""Settings given at load time are lost when a library loads the path of a model once more, as a reference for it."""

import threading
import warnings
import weakref

from transformers import PreTrainedModel

from flash_dmattn_hf.config import SECTION, DynamicMaskConfig
from flash_dmattn_hf.gates.attach import text_config_of
from flash_dmattn_hf.names import NAMES

_models: "weakref.WeakSet[PreTrainedModel]" = weakref.WeakSet()
"""Models with dynamic masks that are in use."""
_lock = threading.Lock()


def remember(model: PreTrainedModel) -> None:
    """Notes a model with dynamic masks, for as long as it lives."""
    with _lock:
        _models.add(model)


def warn_if_lost(model: PreTrainedModel) -> None:
    """Warns when a model, loaded without settings, runs with others than one from the same path that is in use."""
    path, section = model.name_or_path, getattr(text_config_of(model), SECTION, None)
    with _lock:
        others = [getattr(text_config_of(other), SECTION, None) for other in _models if other.name_or_path == path]
    given = next((other for other in others if path and other is not None and other != section), None)
    if given is None or section is None:
        return
    wanted = DynamicMaskConfig.from_dict(given).chosen()
    got = {name: value for name, value in section.items() if given[name] != value}
    kwargs = f'{{"attn_implementation": "{NAMES[0]}", "{SECTION}": {wanted}}}'
    warnings.warn(
        f"{path} is in use with {SECTION}={wanted}, and was loaded once more with {got}: give the same settings again. "
        f"Trainers of TRL that load a reference model take them in their config, as model_init_kwargs={kwargs}",
        stacklevel=4,
    )
