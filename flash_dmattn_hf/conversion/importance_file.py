"""The importance of a model as files of its own: the gates' parameters and settings, without the model.

A directory holds `importance.safetensors`, with tensors `layers.<layer_idx>.<parameter of the gate>`, and
`importance.json`, with the settings, the name of the base model, and its architecture with a hash.
"""

import hashlib
import json
import os
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel

from flash_dmattn_hf.config import SECTION, DynamicMaskConfig
from flash_dmattn_hf.conversion.checkpoint import PICKLES, first_line, read_json
from flash_dmattn_hf.conversion.convert import ConversionReport, LayerReport, convert_model
from flash_dmattn_hf.gates.attach import check_shares, iter_gates, parameter_shapes, plan, refusal, text_config_of
from flash_dmattn_hf.gates.divided import is_divided
from flash_dmattn_hf.gates.eligibility import is_native_doge
from flash_dmattn_hf.gates.importance import Gate, ImportanceGate
from flash_dmattn_hf.names import GATE_NAME, NAMES, is_ours

WEIGHTS, HEADER = "importance.safetensors", "importance.json"
FORMAT = 1
_ARCHITECTURE = (
    "model_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
)
"""Fields of a text config that say whether two models are of one kind, in every version of transformers."""


@dataclass(frozen=True)
class SavedImportance:
    """What a directory of `save_importance` holds.

    tensors: layer_idx -> name of the gate's parameter -> tensor. architecture: field of the text config -> its value.
    """

    settings: DynamicMaskConfig
    tensors: dict[int, dict[str, torch.Tensor]]
    base_model: str
    architecture: dict[str, Any]
    architecture_sha256: str


def save_importance(
    model: nn.Module, directory: str | Path, *, base_model: str | None = None, dtype: torch.dtype | None = None
) -> None:
    """Writes the importance of a converted model, and its settings, into `directory`.

    model: a converted model, or anything around one, such as PEFT, whose active copy of the gates is taken.
    base_model: what to call the model that the importance belongs to; None: where it was loaded from.
    dtype: of the file, such as torch.bfloat16 for half the size; None: that of the parameters.

    Raises ValueError for a model without gates, native Doge, and parameters that are sharded or not in memory.
    """
    model = _base_of(model)
    gates = list(iter_gates(model))
    if not gates:
        raise ValueError(f"model must have dynamic masks, got {type(model).__name__} without any")
    _refuse_native(model)
    tensors = {}
    for _, _, gate in gates:
        for name, parameter in _parameters_of(gate).items():
            if parameter.is_meta or is_divided(parameter):
                raise ValueError(f"{name} of layer {gate.layer_idx} must be in memory as a whole to be saved")
            tensors[f"layers.{gate.layer_idx}.{name}"] = parameter.detach().to("cpu", dtype).contiguous()
    architecture = _architecture_of(model)
    header = {
        "format": FORMAT,
        "base_model": model.config.name_or_path if base_model is None else base_model,
        "architecture": architecture,
        "architecture_sha256": _hash(architecture),
        "settings": gates[0][2].config.to_dict(),
    }
    directory = Path(directory).expanduser()
    directory.mkdir(parents=True, exist_ok=True)
    _write(directory / WEIGHTS, lambda path: save_file(tensors, path))
    _write(directory / HEADER, lambda path: path.write_text(json.dumps(header, indent=2) + "\n", encoding="utf-8"))


def load_importance(model: nn.Module, directory: str | Path) -> nn.Module:
    """Gives a model the importance and the settings of a directory of `save_importance`, in place, and returns it.

    model: a dense model, which is converted, or one that is converted already, with the same layers, heads and input of
        the importance; its window sizes, form and bias become those of the directory. In the base of a PEFT model the
        active copy of the gates is written.

    What was done is left in `model.flash_dmattn_report`.
    Raises ValueError when a file is missing or damaged, and for what does not fit: another architecture, other layers,
    other shapes, another input. The model is then as it was.
    """
    saved, model_given = read_importance(directory), model
    model = _base_of(model)
    _refuse_native(model)
    if absent := next((n for n, p in model.named_parameters() if p.is_meta or is_divided(p)), None):
        raise ValueError(
            f"model must be in memory to take an importance, but {absent} is not as a whole: load it without offload, "
            "on one rank"
        )
    _check_architecture(model, saved, directory)
    planned = plan(model, saved.settings)
    if planned.refused or not planned.shapes:
        raise ValueError(refusal(model, planned))
    check_shares(model, planned)
    found = {layer: {name: tuple(t.shape) for name, t in some.items()} for layer, some in saved.tensors.items()}
    _check_same(f"the importance in {directory}", found, parameter_shapes(model, planned))
    gates = [gate for _, _, gate in iter_gates(model)]
    if gates:
        _change_settings(model, gates, saved)
    else:
        convert_model(model, saved.settings)
    layers = []
    with torch.no_grad():
        for layer_name, _, gate in iter_gates(model):
            tensors = saved.tensors[gate.layer_idx]
            for name, parameter in _parameters_of(gate).items():
                parameter.copy_(tensors[name])
            layers.append(LayerReport(layer_name, sum(tensor.numel() for tensor in tensors.values())))
    model.flash_dmattn_report = ConversionReport(
        model_class=type(model).__name__,
        config=saved.settings,
        layers=tuple(layers),
        skipped=planned.skipped,
        parameters_before=sum(p.numel() for name, p in model.named_parameters() if f".{GATE_NAME}." not in name),
        importance_source=str(directory),
    )
    return model_given


def read_importance(directory: str | Path) -> SavedImportance:
    """Reads a directory of `save_importance`. Raises ValueError naming the file that is missing or damaged."""
    directory = Path(directory).expanduser()
    if not directory.is_dir():
        raise ValueError(f"importance must be a directory of save_importance, got {directory}")
    if not (directory / WEIGHTS).is_file() or not (directory / HEADER).is_file():
        pickles = [path.name for path in sorted(directory.iterdir()) if path.suffix in PICKLES]
        unread = f"; {pickles[0]} is a pickle, which could hide code and is never read" if pickles else ""
        raise ValueError(f"{directory} must contain {WEIGHTS} and {HEADER}{unread}")
    header = read_json(directory / HEADER)
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise ValueError(f"{directory / HEADER} must have format {FORMAT}, as save_importance writes it")
    try:
        settings = DynamicMaskConfig.from_dict(header["settings"]).resolve(dense=True)
        fields = {name: header[name] for name in ("base_model", "architecture", "architecture_sha256")}
    except KeyError as error:
        raise ValueError(f"{directory / HEADER} must be as save_importance writes it, but lacks {error}") from error
    if not isinstance(fields["architecture"], dict):
        raise ValueError(f"{directory / HEADER} must have an architecture of names and values")
    try:
        loaded = load_file(directory / WEIGHTS)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{directory / WEIGHTS} must be a whole safetensors file: {first_line(error)}") from error
    tensors: dict[int, dict[str, torch.Tensor]] = defaultdict(dict)
    for key, tensor in loaded.items():
        prefix, _, rest = key.partition(".")
        layer, _, name = rest.partition(".")
        if prefix != "layers" or not layer.isdecimal():
            raise ValueError(f"{directory / WEIGHTS} must only hold tensors layers.<number>.<name>, got {key}")
        tensors[int(layer)][name] = tensor
    return SavedImportance(settings, dict(tensors), **fields)


def _base_of(model: nn.Module) -> PreTrainedModel:
    found = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)
    if found is None:
        raise ValueError(f"model must be a model of transformers, got {type(model).__name__}")
    return found


def _refuse_native(model: PreTrainedModel) -> None:
    if any(map(is_native_doge, model.modules())):
        raise ValueError(f"{type(model).__name__} has an importance of its own, which is saved with its weights")


def _parameters_of(gate: Gate) -> dict[str, nn.Parameter]:
    """Returns a gate's parameters by name; PEFT hands on those of its active copy."""
    parameters = {"A": gate.A, "dt_proj.weight": gate.dt_proj.weight, "dt_proj.bias": gate.dt_proj.bias}
    return {name: parameter for name, parameter in parameters.items() if parameter is not None}


def _architecture_of(model: PreTrainedModel) -> dict[str, Any]:
    text_config = text_config_of(model)
    return {name: getattr(text_config, name, None) for name in _ARCHITECTURE}


def _hash(architecture: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(architecture, sort_keys=True).encode()).hexdigest()


def _check_architecture(model: PreTrainedModel, saved: SavedImportance, directory: str | Path) -> None:
    architecture = _architecture_of(model)
    if _hash(architecture) == saved.architecture_sha256:
        return
    for name, value in architecture.items():
        if value != saved.architecture.get(name):
            raise ValueError(
                f"the importance in {directory} belongs to {saved.base_model}: model must have {name} "
                f"{saved.architecture.get(name)}, got {value}"
            )
    raise ValueError(f"{Path(directory) / HEADER} must be as save_importance wrote it, but its hash is another")


def _check_same(what: str, found: dict[int, dict[str, tuple]], expected: dict[int, dict[str, tuple]]) -> None:
    if found.keys() != expected.keys():
        raise ValueError(f"{what} must be of layers {sorted(expected)}, got {sorted(found)}")
    for layer, shapes in expected.items():
        if found[layer] != shapes:
            raise ValueError(f"{what} must have {shapes} in layer {layer}, got {found[layer]}")


def _change_settings(model: PreTrainedModel, gates: list[Gate], saved: SavedImportance) -> None:
    """Gives a converted model the settings of a saved importance, if its gates are of that kind."""
    before, settings = gates[0].config, saved.settings
    for field in ("importance_input", "importance_heads"):
        if getattr(before, field) != getattr(settings, field):
            raise ValueError(
                f"model was converted with {field}={getattr(before, field)!r}, but the importance has "
                f"{getattr(settings, field)!r}: load it into the dense model"
            )
    found = {gate.layer_idx: {name: tuple(p.shape) for name, p in _parameters_of(gate).items()} for gate in gates}
    expected = {layer: {name: tuple(t.shape) for name, t in some.items()} for layer, some in saved.tensors.items()}
    _check_same("the gates of a model that is converted already", found, expected)
    for gate in model.modules():
        if isinstance(gate, ImportanceGate):
            gate.config = settings
    if before.add_importance_bias != settings.add_importance_bias:
        for gate in gates:
            if isinstance(gate, ImportanceGate):  # what PEFT wraps has been frozen or not by PEFT
                gate.requires_grad_(settings.add_importance_bias)
    text_config = text_config_of(model)
    setattr(text_config, SECTION, settings.to_dict())
    if not is_ours(text_config._attn_implementation):
        model.set_attn_implementation(NAMES[0])


def _write(path: Path, write: Any) -> None:
    """Writes a file so that it is whole or, if that is interrupted, as before."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        write(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
