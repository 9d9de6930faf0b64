"""Conversion of a dense model to dynamic masks: in place, calibrated on a text if one is given."""

from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel

from flash_dmattn_hf.config import SECTION, DynamicMaskConfig
from flash_dmattn_hf.conversion.calibration import Calibration, CalibrationResult, calibrate
from flash_dmattn_hf.conversion.variants import with_window
from flash_dmattn_hf.gates.attach import attach, detach, iter_gates, plan, text_config_of
from flash_dmattn_hf.gates.eligibility import is_native_doge
from flash_dmattn_hf.names import NAMES

_SOURCES = {"value": "values", "hidden": "hidden state"}

__all__ = ["ConversionReport", "LayerReport", "convert_model", "with_window"]


@dataclass(frozen=True)
class LayerReport:
    """name: of the attention module. parameters: how many it gained. r2: of the calibration, per importance
    head, on keys held out of the fit; empty without calibration."""

    name: str
    parameters: int
    r2: tuple[float, ...] = ()


@dataclass(frozen=True)
class ConversionReport:
    """What a conversion did.

    layers: the converted ones. skipped: name of an attention module left as it was -> why.
    parameters_before: of the dense model. calibration_tokens: 0 without calibration.
    importance_source: the directory that the importance was loaded from, None if it was made here.
    """

    model_class: str
    config: DynamicMaskConfig
    layers: tuple[LayerReport, ...]
    skipped: dict[str, str] = field(default_factory=dict)
    parameters_before: int = 0
    calibration_tokens: int = 0
    importance_source: str | None = None

    @property
    def parameters_added(self) -> int:
        return sum(layer.parameters for layer in self.layers)

    @property
    def mean_r2(self) -> float | None:
        """Mean over layers and heads, None without calibration."""
        values = [value for layer in self.layers for value in layer.r2]
        return sum(values) / len(values) if values else None

    def to_dict(self) -> dict[str, Any]:
        """Values that JSON can hold."""
        return {
            "model_class": self.model_class,
            "config": self.config.to_dict(),
            "layers": {layer.name: {"parameters": layer.parameters, "r2": list(layer.r2)} for layer in self.layers},
            "skipped": self.skipped,
            "parameters_before": self.parameters_before,
            "parameters_added": self.parameters_added,
            "calibration_tokens": self.calibration_tokens,
            "importance_source": self.importance_source,
            "mean_r2": self.mean_r2,
        }

    def __str__(self) -> str:
        config = self.config
        window, sinks, local = config.keep_window_size, config.num_sink_tokens, config.local_window_size
        lines = [
            f"{self.model_class}: {len(self.layers)} of {len(self.layers) + len(self.skipped)} attention layers "
            "converted to dynamic masks",
            f"  window      {window} keys = {sinks} sinks + {local} most recent + {window - sinks - local} "
            f"by importance ({config.importance} of the {_SOURCES[config.importance_input]}, one per "
            f"{config.importance_heads} head)",
            f"  parameters  {self.parameters_added:,} added to {self.parameters_before:,}",
        ]
        if config.window_shares is not None:
            windows = ", ".join(f"{config.window_of(layer)} keys in layer {layer}" for layer in config.window_shares)
            lines.insert(2, f"  others      {windows}: as many sinks and most recent, the rest by importance")
        if self.importance_source is not None:
            lines.append(f"  importance  from {self.importance_source}")
        elif self.calibration_tokens:
            lines.append(
                f"  calibrated  on {self.calibration_tokens:,} tokens, mean R2 {self.mean_r2:.2f} on held-out keys"
            )
        else:
            lines.append("  calibrated  no: all keys tie, so the model sees its sinks and the newest keys")
        width = max((len(layer.name) for layer in self.layers), default=0)
        lines.append(f"  {'layer':{width}}  parameters  R2 per importance head")
        for layer in self.layers:
            r2 = " ".join(f"{value:.2f}" for value in layer.r2) or "-"
            lines.append(f"  {layer.name:{width}}  {layer.parameters:>10,}  {r2}")
        if self.skipped:
            lines.append("  left as they were:")
            lines += [f"    {name}: {reason}" for name, reason in self.skipped.items()]
        return "\n".join(lines)


def convert_model(
    model: PreTrainedModel,
    config: DynamicMaskConfig | dict[str, Any] | None = None,
    *,
    calibration: Calibration | torch.Tensor | None = None,
) -> PreTrainedModel:
    """Gives a dense causal language model dynamic masks, in place, and returns it.

    config: settings, or a dict of them; None means the defaults; sizes that are None become those for dense
        checkpoints (4 sinks, a local window of three quarters). The model is then exactly dense up to
        keep_window_size tokens.
    calibration: token ids (N,) or (1, N), all of which are read, or a `Calibration`; None leaves A at 0, so
        that beyond the window the model sees its sinks and the newest keys.

    What was done is left in `model.flash_dmattn_report` (a `ConversionReport`).
    Raises ValueError for a model that is converted already or cannot be, and for a text too short to
    calibrate; the model is then as it was.
    """
    _refuse_converted(model)
    if not isinstance(config, DynamicMaskConfig):
        config = DynamicMaskConfig.from_dict({} if config is None else config)
    config = config.resolve(dense=True)
    if calibration is not None and not isinstance(calibration, Calibration | torch.Tensor):
        raise ValueError(f"calibration must be token ids in a tensor, got {type(calibration).__name__}")
    if isinstance(calibration, torch.Tensor):
        calibration = Calibration(calibration, num_tokens=calibration.numel())
    parameters_before = sum(parameter.numel() for parameter in model.parameters())
    text_config = text_config_of(model)
    before = text_config._attn_implementation
    try:
        report = attach(model, plan(model, config))
        for _, _, gate in iter_gates(model):
            gate.initialize()
        setattr(text_config, SECTION, config.to_dict())
        model.set_attn_implementation(NAMES[0])
        fitted = None if calibration is None else calibrate(model, calibration)
        layers = tuple(_describe(name, gate, fitted) for name, _, gate in iter_gates(model))
        model.flash_dmattn_report = ConversionReport(
            model_class=type(model).__name__,
            config=config,
            layers=layers,
            skipped=report.skipped,
            parameters_before=parameters_before,
            calibration_tokens=fitted.num_tokens if fitted else 0,
        )
    except BaseException:
        detach(model)
        setattr(text_config, SECTION, None)
        delattr(text_config, SECTION)
        model.set_attn_implementation(before)
        raise
    return model


def _describe(name: str, gate, fitted: CalibrationResult | None) -> LayerReport:
    parameters = sum(parameter.numel() for parameter in gate.parameters())
    return LayerReport(name, parameters, tuple(fitted.r2[name].tolist()) if fitted else ())


def _refuse_converted(model: PreTrainedModel) -> None:
    name = type(model).__name__
    if any(is_native_doge(module) for module in model.modules()):
        raise ValueError(f'{name} has dynamic masks of its own: load it with attn_implementation="{NAMES[0]}"')
    if getattr(text_config_of(model), SECTION, None) is not None or any(True for _ in iter_gates(model)):
        raise ValueError(f"{name} already has dynamic masks: convert the dense model it was made from")
