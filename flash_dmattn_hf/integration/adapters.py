"""PEFT adapters: the settings of the model that an adapter was trained on are saved beside it and come back with it."""

import inspect
import json
import os
import warnings
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.utils import cached_file

from flash_dmattn_hf.config import DynamicMaskConfig, dynamic_mask_config
from flash_dmattn_hf.gates.attach import check_layers, iter_gates
from flash_dmattn_hf.gates.wrapped import find_pretrained
from flash_dmattn_hf.integration.loading import choose_implementation
from flash_dmattn_hf.integration.preparation import settings_of, uses_dynamic_masks
from flash_dmattn_hf.names import GATE_NAME, NAMES

FILE = "flash_dmattn.json"
"""Name of the file with the settings, in the folder of an adapter."""

_HUB_OPTIONS = ("subfolder", "revision", "cache_dir", "token", "local_files_only")


def wrap_save(original: Callable) -> Callable:
    """Writes the settings into the folder of every adapter that PEFT saves."""

    @wraps(original)
    def save_pretrained(self, *args, **kwargs):
        result = original(self, *args, **kwargs)
        given = _arguments(original, self, *args, **kwargs)
        if given["is_main_process"]:
            for name in given["selected_adapters"] or self.peft_config:
                _write(self, Path(given["save_directory"], "" if name == "default" else name))
        return result

    return save_pretrained


def wrap_save_model(original: Callable) -> Callable:
    """Has all layers saved with the settings that they run with, also beside an adapter that transformers has added."""

    @wraps(original)
    def save_pretrained(self, *args, **kwargs):
        check_layers(self)
        result = original(self, *args, **kwargs)
        given = _arguments(original, self, *args, **kwargs)
        if getattr(self, "_hf_peft_config_loaded", False) and given["is_main_process"]:
            _write(self, Path(given["save_directory"]))
        return result

    return save_pretrained


def wrap_from_pretrained(original: Callable) -> Callable:
    """Gives a dense model the settings of the adapter that is put around it, before PEFT looks for its modules."""

    @wraps(original)
    def from_pretrained(cls, model, model_id, *args, **kwargs):
        has_fresh_gates = _is_open(model) and _follow(model, read_settings(model_id, kwargs))
        result = original(cls, model, model_id, *args, **kwargs)
        if has_fresh_gates:
            _warn_without_gates(result, model_id)
        return result

    return from_pretrained


def wrap_load_adapter(original: Callable) -> Callable:
    """Warns, by name, when a model runs with other settings than the adapter that it gets."""

    @wraps(original)
    def load_adapter(self, model_id, *args, **kwargs):
        _compare(self, model_id, read_settings(model_id, kwargs))
        return original(self, model_id, *args, **kwargs)

    return load_adapter


def wrap_load_adapter_of_model(original: Callable) -> Callable:
    """Does both for an adapter that transformers itself loads, as `AutoModel.from_pretrained(adapter)` does."""

    @wraps(original)
    def load_adapter(self, peft_model_id=None, *args, **kwargs):
        settings = read_settings(peft_model_id, {**kwargs, **(kwargs.get("adapter_kwargs") or {})})
        has_fresh_gates = _follow(self, settings)
        _compare(self, peft_model_id, settings)
        result = original(self, peft_model_id, *args, **kwargs)
        if has_fresh_gates:
            _warn_without_gates(self, peft_model_id)
        return result

    return load_adapter


def read_settings(place: str | os.PathLike | None, options: dict[str, Any]) -> DynamicMaskConfig | None:
    """Returns the settings that were saved with an adapter, None if it has none.

    place: a folder, or a repository of the Hub; None for an adapter that is no file. What is wrong with a place is for
    PEFT to say: one that cannot be asked has no settings. Raises ValueError for a file without sensible settings.
    options: may hold subfolder, revision, cache_dir, token and local_files_only.
    """
    if place is None:
        return None
    given = {name: options[name] for name in _HUB_OPTIONS if options.get(name) is not None}
    if os.path.isdir(place):
        file = os.path.join(place, given.get("subfolder", ""), FILE)
        file = file if os.path.isfile(file) else None
    else:
        try:
            file = cached_file(
                place,
                FILE,
                **given,
                _raise_exceptions_for_gated_repo=False,
                _raise_exceptions_for_missing_entries=False,
                _raise_exceptions_for_connection_errors=False,
            )
        except (OSError, ValueError):
            return None
    return None if file is None else DynamicMaskConfig.from_dict(json.loads(Path(file).read_text()))


def _arguments(function: Callable, *args, **kwargs) -> dict[str, Any]:
    """Returns the arguments of a call by name, defaults included."""
    bound = inspect.signature(function).bind(*args, **kwargs)
    bound.apply_defaults()
    return bound.arguments


def _write(wrapped: nn.Module, folder: Path) -> None:
    """Writes the settings of a model with dynamic masks; a dense one leaves no file of an earlier adapter there."""
    model = find_pretrained(wrapped)
    if model is not None and uses_dynamic_masks(model) and any(iter_gates(model)):
        (folder / FILE).write_text(json.dumps(settings_of(model).to_dict(), indent=2) + "\n")
    else:
        (folder / FILE).unlink(missing_ok=True)


def _is_open(model: nn.Module) -> bool:
    """Whether nobody has chosen an implementation for a model."""
    return isinstance(model, PreTrainedModel) and not getattr(model, "_flash_dmattn_was_chosen", True)


def _follow(model: nn.Module, settings: DynamicMaskConfig | None) -> bool:
    """Gives an open model dynamic masks with these settings; returns whether it has got new gates."""
    if settings is None or not _is_open(model) or uses_dynamic_masks(model):
        return False
    with dynamic_mask_config(**settings.to_values()):
        return bool(choose_implementation(PreTrainedModel.set_attn_implementation.__wrapped__, model, NAMES[0]))


def _warn_without_gates(wrapped: nn.Module, place: str | os.PathLike) -> None:
    """Warns when an adapter was loaded that gave new gates no weights."""
    if not any(f".{GATE_NAME}.modules_to_save." in name for name, _ in wrapped.named_parameters()):
        warnings.warn(
            f"the adapter {place} has no weights of the importance, which is untrained: beyond keep_window_size tokens "
            f'the model sees sinks and a sliding window. Train adapters with modules_to_save=["{GATE_NAME}"]',
            stacklevel=3,
        )


def _compare(wrapped: nn.Module, place: str | os.PathLike, settings: DynamicMaskConfig | None) -> None:
    model = find_pretrained(wrapped)
    if settings is None or model is None:
        return
    if not uses_dynamic_masks(model):
        problem = f'runs with attn_implementation="{model.config._attn_implementation}"'
    else:
        mine = settings_of(model).to_values()
        others = {name: mine[name] for name, value in settings.to_values().items() if value != mine[name]}
        if not others:
            return
        problem = f"has {others}"
    wanted = settings.chosen()
    warnings.warn(
        f"the adapter {place} was trained with flash_dmattn={wanted}, and the {type(model).__name__} that gets it "
        f'{problem}: load the model with attn_implementation="{NAMES[0]}", flash_dmattn={wanted}',
        stacklevel=3,
    )
