"""Calibration: an importance that predicts, from a token itself, whether it will be attended to from far away.

Per layer and importance head, ridge regression of log(mean attention mass that a key receives from queries at least
`local_window_size` away) on the values of the key's token, or on its hidden state (`importance_input`). The fit becomes
`dt_proj`; A is positive and so small that the biases of any two tokens differ by less than 1e-3: the ranking is learned
while the logits stay those of the dense model.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

from flash_dmattn_hf.conversion.attention_mass import attention_and_mass, far_queries
from flash_dmattn_hf.conversion.ridge import RidgeStatistics, fit
from flash_dmattn_hf.evaluation.perplexity import cut
from flash_dmattn_hf.forms import FORMS
from flash_dmattn_hf.gates.attach import iter_gates
from flash_dmattn_hf.gates.importance import ImportanceGate, source_of
from flash_dmattn_hf.integration.observed_attention import observed_attention
from flash_dmattn_hf.progress import progress_bar

DEFAULT_TOKENS = 16384
BIAS_SPREAD = 5e-4
"""Largest minus smallest importance over the calibration tokens: half of what any text is allowed."""
MAX_DT = 20.0
"""Outputs of dt_proj are scaled into this range, where every form strictly rises with dt in float32."""
MIN_FAR_QUERIES = 64
"""A key seen by fewer far queries, or by less than a quarter of a stretch's, has too noisy a mean to learn from."""
SAMPLES_PER_FEATURE = 4
MIN_SAMPLES = 512
HELD_OUT_BLOCK = 16
"""Keys are dealt in blocks of so many, every fifth block to the test of the fit."""
MASS_FLOOR = 1e-4
"""Added to the mean mass before its log: how far below it a key is does not matter, it never stays anyway."""


@dataclass(frozen=True)
class Calibration:
    """The text to calibrate on.

    input_ids: (N,) or (1, N) token ids of running text, in the model's vocabulary.
    stretch_length: tokens per forward pass; None: max(2048, 2 * local_window_size), at most the model's
        max_position_embeddings.
    num_tokens: use the first so many of input_ids; None: DEFAULT_TOKENS, more where the model needs more.
    progress: draw progress bars on a terminal.
    """

    input_ids: torch.Tensor
    stretch_length: int | None = None
    num_tokens: int | None = None
    progress: bool = False


class CalibrationResult(NamedTuple):
    """r2: name of the attention module -> (Hi,) R2 of the prediction on keys held out of the fit.
    num_tokens: how much text was read."""

    r2: dict[str, torch.Tensor]
    num_tokens: int


@torch.no_grad()
def calibrate(model: nn.Module, calibration: Calibration) -> CalibrationResult:
    """Sets A and dt_proj of every gate of `model` from the attention of the dense model on a text.

    Reads the text twice: for the regression, then for the range of the predictions. Memory: two F x F float64
    matrices per layer, F = Hkv * D or the hidden size, however long the text. Raises ValueError when the text is too
    short; no parameter has changed then.
    """
    layers = {module: (name, gate) for name, module, gate in iter_gates(model)}
    gates = {module: gate for module, (_, gate) in layers.items()}
    if not all(isinstance(gate, ImportanceGate) for gate in gates.values()) or not gates:
        raise ValueError(f"model must have importance gates to calibrate, got {type(model).__name__} without")
    stretches = cut_text(gates.values(), calibration, _longest_input(model))

    statistics = {
        module: [
            RidgeStatistics(gate.dt_proj.weight.shape[1], gate.num_importance_heads, gate.A.device)
            for _ in range(2)
        ]
        for module, gate in gates.items()
    }
    collector = _Collector(gates, statistics)
    _read(model, stretches, collector, calibration.progress and "calibrating (1/2)")
    fits = {}
    for module, (name, _) in layers.items():
        if not collector.tokens_read[module]:
            raise ValueError(f"{name} must be called through the attention interface to be calibrated, but never was")
        fits[module] = fit(*statistics.pop(module))
        if not fits[module][0].isfinite().all():
            raise ValueError(f"{name} must have finite values and attention on the calibration text, got NaN or inf")

    ranges = _Ranges(gates, {module: weight for module, (weight, _, _) in fits.items()})
    _read(model, stretches, ranges, calibration.progress and "calibrating (2/2)")
    for module, gate in gates.items():
        weight, mean_x, _ = fits[module]
        low, high = ranges.low[module], ranges.high[module]
        _write(gate, weight, weight @ mean_x, low, high)
    r2 = {name: fits[module][2].float().cpu() for module, (name, _) in layers.items()}
    return CalibrationResult(r2, stretches.numel())


def required_tokens(gate, stretch_length: int) -> int:
    """Tokens, in whole stretches, whose usable keys are SAMPLES_PER_FEATURE for each feature of this gate."""
    usable = int(usable_keys(gate, stretch_length).sum())
    if usable == 0:
        keep, sinks, local, sliding = gate.windows
        needed = local + MIN_FAR_QUERIES
        if sliding is not None and sliding < needed:
            raise ValueError(
                f"the sliding window of layer {gate.layer_idx} must be at least local_window_size + {MIN_FAR_QUERIES} "
                f"= {needed} for calibration, got {sliding}; with a keep_window_size of {sliding} instead of {keep} "
                "the layer would stay as it is"
            )
        reach = sinks + local + MIN_FAR_QUERIES
        raise ValueError(
            f"stretch_length must exceed num_sink_tokens + local_window_size + {MIN_FAR_QUERIES} = {reach} "
            f"for calibration, got {stretch_length}; a smaller local_window_size would do as well"
        )
    samples = max(MIN_SAMPLES, SAMPLES_PER_FEATURE * gate.dt_proj.weight.shape[1])
    return -(-samples // usable) * stretch_length


def usable_keys(gate, length: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """(T,) bool: keys of a sequence of `length` that compete and that enough far queries see."""
    count = far_queries(length, gate.windows.local_window_size, gate.windows.sliding_window, device)
    usable = count >= max(MIN_FAR_QUERIES, int(count.max()) // 4)
    usable[: gate.windows.num_sink_tokens] = False
    return usable


def default_stretch_length(gates, longest: int | None) -> int:
    length = max(2048, *(2 * gate.windows.local_window_size for gate in gates))
    return length if longest is None else min(length, longest)


def cut_text(gates, calibration: Calibration, longest: int | None) -> torch.Tensor:
    """Returns (stretches, stretch_length) token ids; ValueError when the text is too short for these gates."""
    length = calibration.stretch_length or default_stretch_length(gates, longest)
    needed = max(required_tokens(gate, length) for gate in gates)
    num_tokens = calibration.num_tokens or max(needed, DEFAULT_TOKENS)
    input_ids = torch.as_tensor(calibration.input_ids).flatten()[:num_tokens]
    if len(input_ids) < needed:
        raise ValueError(
            f"the calibration text must have at least {needed} tokens for this model, window and "
            f"stretch_length {length}, got {len(input_ids)}"
        )
    return cut(input_ids, length)


class _Collector:
    """Dense attention that adds (token, log mean far mass) of its keys to the statistics of its layer."""

    def __init__(self, gates: dict, statistics: dict):
        self.gates, self.statistics = gates, statistics
        self.tokens_read = dict.fromkeys(gates, 0)

    def __call__(self, module, query, key, value, softmax_scale, softcap):
        gate = self.gates[module]
        out, mass = attention_and_mass(
            query[0],
            key[0],
            value[0],
            distance=gate.windows.local_window_size,
            softmax_scale=softmax_scale,
            softcap=softcap,
            sliding_window=gate.windows.sliding_window,
        )
        length = value.shape[2]
        count = far_queries(length, gate.windows.local_window_size, gate.windows.sliding_window, value.device)
        mean_mass = mass.view(gate.num_importance_heads, -1, length).mean(1) / count.clamp(min=1)
        log_mass = (mean_mass + MASS_FLOOR).log().T  # (T, Hi)
        tokens = _tokens(gate, value)
        usable = usable_keys(gate, length, value.device)
        order = torch.arange(length, device=value.device) + self.tokens_read[module]
        held_out = order // HELD_OUT_BLOCK % 5 == 4
        self.tokens_read[module] += length
        train, test = self.statistics[module]
        train.add(tokens[usable & ~held_out], log_mass[usable & ~held_out])
        test.add(tokens[usable & held_out], log_mass[usable & held_out])
        return out[None]


class _Ranges:
    """Dense attention that follows the smallest and largest prediction (Hi,) of each layer."""

    def __init__(self, gates: dict, weights: dict):
        self.gates, self.weights = gates, weights
        self.low, self.high = {}, {}

    def __call__(self, module, query, key, value, softmax_scale, softcap):
        prediction = _tokens(self.gates[module], value).double() @ self.weights[module].T
        low, high = prediction.amin(0), prediction.amax(0)
        self.low[module] = torch.minimum(low, self.low.get(module, low))
        self.high[module] = torch.maximum(high, self.high.get(module, high))
        out, _ = attention_and_mass(
            query[0],
            key[0],
            value[0],
            distance=query.shape[2],
            softmax_scale=softmax_scale,
            softcap=softcap,
            sliding_window=self.gates[module].windows.sliding_window,
        )
        return out[None]


def _write(gate, weight: torch.Tensor, mean: torch.Tensor, low: torch.Tensor, high: torch.Tensor) -> None:
    """Turns a fit into the gate's parameters.

    weight: (Hi, F). mean, low, high: (Hi,), the mean and the range of weight @ token. A positive factor and
    a shift keep the ranking, so dt = scale * (weight @ token [- mean]) with |dt| <= MAX_DT.
    """
    shift = mean if gate.dt_proj.bias is not None else torch.zeros_like(mean)
    reach = torch.maximum((low - shift).abs(), (high - shift).abs())
    scale = (MAX_DT / reach.clamp_min(torch.finfo(torch.float32).tiny)).clamp(max=1.0)
    gate.dt_proj.weight.copy_(scale[:, None] * weight)
    if gate.dt_proj.bias is not None:
        gate.dt_proj.bias.copy_(-scale * shift)
    score, one = FORMS[gate.config.importance].score, torch.ones_like(scale)
    spread = score(one, scale * (high - shift)) - score(one, scale * (low - shift))
    gate.A.copy_(BIAS_SPREAD / spread.clamp_min(BIAS_SPREAD))


def _read(model: nn.Module, stretches: torch.Tensor, compute, label: str | bool) -> None:
    """One dense forward pass per stretch, `compute` being the attention of the layers it has gates for."""
    device, was_training = model.get_input_embeddings().weight.device, model.training
    model.eval()
    try:
        with observed_attention(compute.gates, compute):
            for stretch in progress_bar(stretches, label, unit="stretch"):
                model.base_model(input_ids=stretch[None].to(device), use_cache=False)
    finally:
        model.train(was_training)


def _tokens(gate: ImportanceGate, value: torch.Tensor) -> torch.Tensor:
    """Returns (T, F), the input of dt_proj, for the tokens with these values (1, Hkv, T, D)."""
    return source_of(gate, value)[0].transpose(0, 1).flatten(1)


def _longest_input(model: nn.Module) -> int | None:
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)
