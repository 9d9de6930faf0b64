"""Gets the gates of a model ready for soft training: a start on the straight part of softplus, and input statistics.

Soft selection compares importances in units of their own standard deviation. So neither a factor nor a shift of a
head's importance matters to it, nor to the hard ranking. That leaves two numbers of a gate free, which are used here:

- `A` is not trained. Its size does not matter, and a change of its sign would turn the ranking over. Where the
  importance is not added to the logits it becomes 1 (-1 if it was negative).
- The bias of dt_proj shifts dt to a mean of `LEVEL` on the text, where softplus is the identity. Near 0 it would press
  the keys far below the cut together, and they are the ones that need a gradient. `LEVEL` is high because training
  spreads dt over tens. So for ranking the importance is a linear function of its input, and where it is not added to
  the logits dt is scaled to a standard deviation of 1: a learning rate means the same to every head of every model.
  Without a bias dt stays where and as wide as it is.
"""

from collections.abc import Iterable
from typing import Any

import torch
from accelerate.utils import broadcast
from torch import nn

from flash_dmattn_hf.evaluation.final_states import evaluating
from flash_dmattn_hf.forms import FORMS
from flash_dmattn_hf.gates.attach import iter_gates
from flash_dmattn_hf.gates.eligibility import is_native_doge
from flash_dmattn_hf.gates.importance import ImportanceGate
from flash_dmattn_hf.training.deferred_logits import deferred_logits
from flash_dmattn_hf.training.standardized_inputs import StandardizedLayer

LEVEL = 100.0
SMALLEST_STD = 1e-3
"""Inputs that vary less than this, in units of the mean standard deviation, are taken to vary by so much."""


def check_gates(model: nn.Module) -> None:
    """Raises ValueError for a model without gates, or whose importance would not move or be lost."""
    gates = list(iter_gates(model))
    if not gates or any(is_native_doge(module) for _, module, _ in gates):
        name = type(model).__name__
        raise ValueError(f"model must be one that convert_model has given dynamic masks, got {name}")
    for name, _, gate in gates:
        if hasattr(model, "peft_config") and isinstance(gate, ImportanceGate):
            raise ValueError('the adapter must have modules_to_save=["dma"], or it would not save what the gates learn')
        if gate.config.add_importance_bias and not gate.A.all():
            raise ValueError(f"A of {name} must not be 0 where the importance is added to the logits: calibrate it")


@torch.no_grad()
def prepare_gates(model: nn.Module, stretches: Iterable[torch.Tensor]) -> list[StandardizedLayer]:
    """Moves every gate to its start, which leaves the ranking of keys as it is, and measures the inputs of its dt_proj.

    stretches: token ids (S,) each, of a few stretches of running text.
    Returns for every gate its dt_proj with mean and standard deviation of its inputs over the tokens after the sinks,
    which never compete. All processes get those of the first.
    """
    gates = [gate for _, _, gate in iter_gates(model)]
    layers = []
    for gate, (inputs, dts) in zip(gates, _measure(model, gates, stretches), strict=True):
        (mean, std), (_, spread) = (tuple(map(broadcast, moments.mean_and_std())) for moments in (inputs, dts))
        weight, bias = gate.dt_proj.weight, gate.dt_proj.bias
        if not gate.config.add_importance_bias:
            gate.A.copy_(torch.where(gate.A < 0, -1.0, 1.0))
        if bias is not None and FORMS[gate.config.importance].max_exponent is None:
            if not gate.config.add_importance_bias:
                weight /= torch.where(spread > 0, spread, 1.0).unsqueeze(1)
            bias.copy_(LEVEL - weight.double() @ mean)
        std = std.clamp_min(SMALLEST_STD * std.mean()).clamp_min(torch.finfo(torch.float32).tiny)
        layers.append(StandardizedLayer(gate.dt_proj, mean, std))
    return layers


def _measure(model: nn.Module, gates: list, stretches: Iterable[torch.Tensor]) -> "list[tuple[_Moments, _Moments]]":
    """Returns for every gate the moments of what its dt_proj reads and gives."""
    found = [(_Moments(gate.windows.num_sink_tokens), _Moments(gate.windows.num_sink_tokens)) for gate in gates]

    def hook(inputs: "_Moments", dts: "_Moments"):
        def add(module: nn.Module, arguments: tuple[Any, ...], output: torch.Tensor) -> None:
            inputs.add(arguments[0])
            dts.add(output)

        return add

    handles = [gate.dt_proj.register_forward_hook(hook(*pair)) for gate, pair in zip(gates, found, strict=True)]
    try:
        with evaluating(model), deferred_logits(model):  # nobody needs the logits
            for stretch in stretches:
                model(input_ids=stretch[None].to(model.get_input_embeddings().weight.device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return found


class _Moments:
    """Sums over tokens (1, S, features), without the first ones."""

    def __init__(self, num_skipped: int) -> None:
        self.num_skipped, self.count, self.sum, self.squares = num_skipped, 0, 0, 0

    def add(self, tokens: torch.Tensor) -> None:
        tokens = tokens[0, self.num_skipped :].double()
        self.count += len(tokens)
        self.sum += tokens.sum(0)
        self.squares += tokens.square().sum(0)

    def mean_and_std(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns mean and standard deviation (features,) float64."""
        mean = self.sum / self.count
        return mean, (self.squares / self.count - mean.square()).clamp_min(0).sqrt()
