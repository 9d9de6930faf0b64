"""The wrappers around a model's construction and loading, so that gates exist before weights do."""

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from functools import wraps
from typing import Any

from transformers import PreTrainedModel

from flash_dmattn_hf.config import SECTION, DynamicMaskConfig, dynamic_mask_config, load_time_values, read_values
from flash_dmattn_hf.gates import attach
from flash_dmattn_hf.gates.attach import text_config_of
from flash_dmattn_hf.gates.eligibility import chooses_class_by_name
from flash_dmattn_hf.gates.importance import ImportanceGate
from flash_dmattn_hf.gates.offload import materialize
from flash_dmattn_hf.integration.fitting_weights import check_weights, warn_if_unused
from flash_dmattn_hf.integration.lost_settings import warn_if_lost
from flash_dmattn_hf.integration.preparation import (
    choose_for_text_part,
    leave_other_parts_native,
    name_text_part,
    prepare,
    refuse_without_gates,
    remove_hook,
    settings_of,
    submodels,
    uses_dynamic_masks,
)
from flash_dmattn_hf.integration.ranks import initialize
from flash_dmattn_hf.names import NAMES, is_ours


def wrap_check_implementation(original: Callable) -> Callable:
    """Prepares a model for our implementation, and makes ours the default where a config has our section."""

    @wraps(original)
    def check(self, attn_implementation, is_init_check=False, *args, **kwargs):
        self._flash_dmattn_was_chosen = attn_implementation is not None
        if is_ours(attn_implementation):
            choose_for_text_part(self.config, attn_implementation)
            leave_other_parts_native(self.config)
            if is_init_check and chooses_class_by_name(type(self)):
                raise ValueError(
                    f"{type(self).__name__} cannot use flash_dmattn: it chooses its attention class by the name of "
                    "the implementation, and has no class for flash_dmattn"
                )
        elif is_init_check and getattr(text_config_of(self), SECTION, None) is not None:
            if attn_implementation is None:
                return NAMES[0]
            if text_config_of(self) is self.config:  # the text part of a composite model chooses itself
                warnings.warn(
                    f'this checkpoint was converted to dynamic masks, but attn_implementation="{attn_implementation}" '
                    "was chosen: its attention is dense and the importance is not used",
                    stacklevel=2,
                )
        return original(self, attn_implementation, is_init_check, *args, **kwargs)

    return check


def wrap_post_init(original: Callable) -> Callable:
    """Attaches gates before the model initialises or loads weights."""

    @wraps(original)
    def post_init(self, *args, **kwargs):
        self._flash_dmattn_was_prepared = True
        prepare(self)
        return original(self, *args, **kwargs)

    return post_init


def wrap_initialize_weights(original: Callable) -> Callable:
    """Initialises the gates whose parameters no checkpoint has given."""

    @wraps(original)
    def initialize_weights(self, module, *args, **kwargs):
        if isinstance(module, ImportanceGate) and not getattr(module, "_is_hf_initialized", False):
            initialize(module)
            module._is_hf_initialized = True
            return None
        return original(self, module, *args, **kwargs)

    return initialize_weights


def wrap_from_pretrained(original: Callable) -> Callable:
    """Takes `flash_dmattn={...}`, and checks that the gates' weights fit."""

    @wraps(original)
    def from_pretrained(cls, *args, flash_dmattn=None, output_loading_info=False, **kwargs):
        with _load_time(flash_dmattn):
            model, info = original(cls, *args, output_loading_info=True, **kwargs)
        if flash_dmattn is not None and not uses_dynamic_masks(model):
            raise ValueError(
                f'flash_dmattn={{...}} needs attn_implementation="{NAMES[0]}", got '
                f'"{text_config_of(model)._attn_implementation}"'
            )
        _check_loaded(model, info)
        if flash_dmattn is None and not load_time_values() and uses_dynamic_masks(model):
            warn_if_lost(model, kwargs.get("config"))
        return (model, info) if output_loading_info else model

    return from_pretrained


def wrap_load_time(original: Callable) -> Callable:
    """Takes `flash_dmattn={...}` away from a constructor that would not know it."""

    @wraps(original)
    def load(cls, *args, flash_dmattn=None, **kwargs):
        with _load_time(flash_dmattn):
            return original(cls, *args, **kwargs)

    return load


def wrap_config_from_dict(original: Callable) -> Callable:
    """Lets `flash_dmattn={...}` change single values of a section instead of replacing all of it; None changes none."""

    @wraps(original)
    def from_dict(cls, config_dict, **kwargs):
        section, values = config_dict.get(SECTION), kwargs.get(SECTION)
        if section is not None and values is not None:
            kwargs[SECTION] = DynamicMaskConfig.from_dict(section).updated(read_values(values)).to_dict()
        elif section is not None:
            kwargs.pop(SECTION, None)
        return original(cls, config_dict, **kwargs)

    return from_dict


def wrap_set_implementation(original: Callable) -> Callable:
    """Attaches gates when our implementation is chosen for a model that exists already."""

    @wraps(original)
    def set_attn_implementation(self, attn_implementation, *args, **kwargs):
        if choose_implementation(original, self, attn_implementation, *args, **kwargs):
            _warn_untrained()

    return set_attn_implementation


def choose_implementation(
    original: Callable, model: PreTrainedModel, attn_implementation: Any, *args, **kwargs
) -> list[ImportanceGate]:
    """Calls transformers' `set_attn_implementation` and attaches gates if ours is chosen; returns the new gates.

    Raises ValueError for a model that cannot use ours; it then has the implementation of before.
    """
    before = {id(part.config): part.config._attn_implementation for part in submodels(model)}
    if any(attach.iter_gates(model)):
        attach.adopt_layers(model)
    attn_implementation = name_text_part(model.config, attn_implementation)
    original(model, attn_implementation, *args, **kwargs)
    if not is_ours(attn_implementation) and not uses_dynamic_masks(model):
        return []
    try:
        return _attach_to_existing(model, before)
    except ValueError:
        for part in submodels(model):
            part.config._attn_implementation_internal = before[id(part.config)]
            remove_hook(part._forward_pre_hooks, refuse_without_gates)
        raise


def _attach_to_existing(model: PreTrainedModel, before: dict[int, str]) -> list[ImportanceGate]:
    """Attaches and initialises the gates of a model that exists already; returns the new ones."""
    if not uses_dynamic_masks(model):
        raise ValueError(f"{type(model).__name__} cannot use flash_dmattn: it never calls the attention interface")
    known = {id(gate) for _, _, gate in attach.iter_gates(model)}
    was_prepared = known or getattr(model, "_flash_dmattn_was_prepared", False)
    if getattr(text_config_of(model), SECTION, None) is not None and not was_prepared:
        raise ValueError(
            "this checkpoint was converted to dynamic masks and loaded before flash_dmattn_hf was imported, which left "
            "its importance out: import flash_dmattn_hf first and load it again"
        )
    prepare(model, previous=before)
    if not any(True for _ in attach.iter_gates(model)):
        raise ValueError(model._flash_dmattn_refusal)
    fresh = [gate for _, _, gate in attach.iter_gates(model) if id(gate) not in known]
    fresh = [gate for gate in fresh if isinstance(gate, ImportanceGate)]
    for gate in fresh:
        gate.initialize()
    return fresh


def _load_time(values: Any) -> Any:
    return nullcontext() if values is None else dynamic_mask_config(**read_values(values))


def _check_loaded(model: PreTrainedModel, info: dict[str, Any]) -> None:
    """Raises ValueError unless the checkpoint gave all gates their weights, or none of them."""
    has_gates = any(True for _ in attach.iter_gates(model))
    if not has_gates:
        if uses_dynamic_masks(model):
            raise ValueError(model._flash_dmattn_refusal)
        warn_if_unused(info["unexpected_keys"])
        return
    is_new = check_weights(model, info["missing_keys"], info["unexpected_keys"], info["mismatched_keys"])
    for _, _, gate in attach.iter_gates(model):
        if is_new and isinstance(gate, ImportanceGate):
            materialize(gate)
    attach.freeze_unused(model)
    if is_new and uses_dynamic_masks(model):
        _warn_untrained()
    if not is_new and any(getattr(part, "_flash_dmattn_has_default_settings", False) for part in submodels(model)):
        warnings.warn(
            f"this checkpoint was converted to dynamic masks, but it was loaded with a config without {SECTION}: it "
            f"runs with the defaults, {settings_of(model).to_dict()}",
            stacklevel=4,
        )


def _warn_untrained() -> None:
    warnings.warn(
        "the importance of this model is untrained: up to keep_window_size tokens it is the dense model, beyond "
        "that it sees sinks and a sliding window; calibrate it (flash-dmattn convert) or train it",
        stacklevel=4,
    )
