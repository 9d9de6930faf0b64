"""Gets the gates of a model ready for soft training: a start on the straight part of softplus, and input statistics.

Soft selection compares importances in units of their own standard deviation. So neither a factor nor a shift of a
head's importance matters to it, nor to the hard ranking. That leaves two numbers of a gate free, which are used here:

- `A` is not trained. Its size does not matter, and a change of its sign would turn the ranking over. Where the
  importance is not added to the logits it becomes 1 (-1 if it was negative).
- The bias of dt_proj shifts dt to a mean of `LEVEL` on the text, where softplus is the identity up to 5e-5. Near 0 it
  would press the keys far below the cut together, and they are the ones that need a gradient. So for ranking the
  importance is a linear function of its input. Without a bias dt stays where it is.
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

LEVEL = 10.0
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
    for gate, moments in zip(gates, _measure(model, gates, stretches), strict=True):
        mean, std = (broadcast(moment) for moment in moments)
        weight, bias = gate.dt_proj.weight, gate.dt_proj.bias
        if not gate.config.add_importance_bias:
            gate.A.copy_(torch.where(gate.A < 0, -1.0, 1.0))
        if bias is not None and FORMS[gate.config.importance].max_exponent is None:
            bias.copy_(LEVEL - weight.double() @ mean)
        layers.append(StandardizedLayer(weight, bias, mean, std))
    return layers


def _measure(
    model: nn.Module, gates: list, stretches: Iterable[torch.Tensor]
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Returns mean and standard deviation (in,) float64 of the inputs of every gate's dt_proj."""
    inputs = [_Moments(gate.windows.num_sink_tokens) for gate in gates]
    handles = [gate.dt_proj.register_forward_pre_hook(moments.add) for gate, moments in zip(gates, inputs, strict=True)]
    try:
        with evaluating(model), deferred_logits(model):  # nobody needs the logits
            for stretch in stretches:
                model(input_ids=stretch[None].to(model.get_input_embeddings().weight.device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return [moments.mean_and_std() for moments in inputs]


class _Moments:
    """Sums over the inputs (1, S, in) of a layer, without the first tokens."""

    def __init__(self, num_skipped: int) -> None:
        self.num_skipped, self.count, self.sum, self.squares = num_skipped, 0, 0, 0

    def add(self, module: nn.Module, arguments: tuple[Any, ...]) -> None:
        tokens = arguments[0][0, self.num_skipped :].double()
        self.count += len(tokens)
        self.sum += tokens.sum(0)
        self.squares += tokens.square().sum(0)

    def mean_and_std(self) -> tuple[torch.Tensor, torch.Tensor]:
        mean = self.sum / self.count
        std = (self.squares / self.count - mean.square()).clamp_min(0).sqrt()
        return mean, std.clamp_min(SMALLEST_STD * std.mean()).clamp_min(torch.finfo(torch.float32).tiny)
