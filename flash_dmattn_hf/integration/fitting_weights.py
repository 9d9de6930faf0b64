"""Checks that a checkpoint's importance weights fit the gates of the model that they are loaded into."""

import warnings
from collections.abc import Callable, Collection
from functools import wraps
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from flash_dmattn_hf.config import SECTION
from flash_dmattn_hf.gates.attach import iter_gates
from flash_dmattn_hf.gates.divided import whole_shape
from flash_dmattn_hf.gates.importance import ImportanceGate
from flash_dmattn_hf.integration.preparation import settings_of
from flash_dmattn_hf.names import GATE_NAME


def gate_parameters(model: PreTrainedModel) -> dict[str, nn.Parameter]:
    """Returns the parameters of a model's gates, by their names in the model."""
    return {
        f"{name}.{GATE_NAME}.{parameter_name}": parameter
        for name, _, gate in iter_gates(model)
        if isinstance(gate, ImportanceGate)
        for parameter_name, parameter in gate.named_parameters()
    }


def check_weights(
    model: PreTrainedModel, missing: Collection[str], unexpected: Collection[str], mismatched: Collection[Any]
) -> bool:
    """Returns whether a checkpoint is one without importance. Raises ValueError if it gave only some of the gates
    their weights, or has importance weights that do not fit.

    missing, unexpected, mismatched: names of weights as transformers reports them; mismatched may hold tuples, whose
    first part is the name.
    """
    parameters = gate_parameters(model).keys()
    lacking = parameters & set(missing)
    unused = sorted(key for key in unexpected if f".{GATE_NAME}." in key)
    if not lacking:  # a model may have fewer layers than its checkpoint
        unused = [key for key in unused if not _is_of_absent_layer(key, unexpected)]
    misshapen = [entry for entry in mismatched if (entry if isinstance(entry, str) else entry[0]) in parameters]
    if unused or misshapen or (lacking and lacking != parameters):
        problems = {"has no": sorted(lacking), "has unused": unused, "has misshapen": misshapen}
        words = ", ".join(f"{verb} {keys[0]} (of {len(keys)})" for verb, keys in problems.items() if keys)
        raise ValueError(
            f"the checkpoint's importance weights must fit config.{SECTION}={settings_of(model).to_dict()}, "
            f"but it {words}"
        )
    return bool(lacking)


def warn_if_unused(unexpected: Collection[str]) -> None:
    """Warns if a model without gates was loaded from a checkpoint with importance: its config has no settings.

    unexpected: names of weights that found no place, as transformers reports them.
    """
    if any(f".{GATE_NAME}." in key and not _is_of_absent_layer(key, unexpected) for key in unexpected):
        warnings.warn(
            f"this checkpoint was converted to dynamic masks, but it was loaded with a config without {SECTION}: its "
            "attention is dense and the importance is not used",
            stacklevel=5,
        )


def _is_of_absent_layer(key: str, unexpected: Collection[str]) -> bool:
    """Whether the other weights of a gate's attention module find no place either."""
    module, _, _ = key.rpartition(f".{GATE_NAME}.")
    return any(other.startswith(f"{module}.") and f".{GATE_NAME}." not in other for other in unexpected)


def wrap_zero3_loading(original: Callable) -> Callable:
    """Returns transformers' loading for DeepSpeed's ZeRO-3, which never says what found no place, with these checks.

    They are made on every process, because only the first one reads values.
    """

    @wraps(original)
    def load(model_to_load: PreTrainedModel, state_dict: dict[str, Any], *args, **kwargs):
        parameters = gate_parameters(model_to_load)
        if parameters:
            found = {_place_of(key, parameters): value for key, value in state_dict.items() if f".{GATE_NAME}." in key}
            fitting = found.keys() & parameters.keys()
            mismatched = sorted(key for key in fitting if tuple(found[key].shape) != whole_shape(parameters[key]))
            check_weights(model_to_load, parameters.keys() - fitting, found.keys() - fitting, mismatched)
        return original(model_to_load, state_dict, *args, **kwargs)

    return load


def _place_of(key: str, parameters: Collection[str]) -> str:
    """Returns the name in the model of a checkpoint's weight: one of them may have a prefix that the other lacks."""
    return next((name for name in parameters if name.endswith(f".{key}") or key.endswith(f".{name}")), key)
