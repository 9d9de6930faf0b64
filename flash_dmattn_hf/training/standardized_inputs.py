"""Training a linear layer as if its inputs were standardised, without changing the layer.

With x' = (x - mean) / std the layer is w x + b = w' x' + b', where w' = w std and b' = b + w mean. An optimizer that
moves w' and b' moves all inputs at one pace, however large or shifted they are. Here the gradients are taken to these
coordinates before a step, and what the step changed is taken back after it. So parameters, checkpoints and forward are
those of the plain layer, and nothing has to be folded into it at the end.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn


class StandardizedLayer(NamedTuple):
    """weight: (out, in). bias: (out,); None: the inputs are only scaled. mean, std: (in,), of the inputs."""

    weight: nn.Parameter
    bias: nn.Parameter | None
    mean: torch.Tensor
    std: torch.Tensor


def standardize_inputs(optimizer: torch.optim.Optimizer, layers: Sequence[StandardizedLayer]) -> None:
    """Lets an optimizer take its steps on the layers in the coordinates of standardised inputs.

    Exact for every optimizer whose weight decay is 0 for them. Hooks registered later see the gradients there.
    """
    before: list[torch.Tensor] = []

    @torch.no_grad()
    def to_standardized(*_: Any) -> None:
        before[:] = [layer.weight.clone() for layer in layers]
        for weight, bias, mean, std in layers:
            if weight.grad is None:
                continue
            if bias is not None and bias.grad is not None:
                weight.grad -= torch.outer(bias.grad, mean.to(weight.grad))
            weight.grad /= std.to(weight.grad)

    @torch.no_grad()
    def back(*_: Any) -> None:
        for old, (weight, bias, mean, std) in zip(before, layers, strict=True):
            change = (weight - old) / std.to(weight)
            weight.copy_(old + change)
            if bias is not None:
                bias -= change @ mean.to(weight)

    optimizer.register_step_pre_hook(to_standardized)
    optimizer.register_step_post_hook(back)


def clip_each_group(optimizer: torch.optim.Optimizer, max_norm: float) -> None:
    """Clips the gradient of every parameter group to a norm of its own, before every step."""

    def clip(*_: Any) -> None:
        for group in optimizer.param_groups:
            torch.nn.utils.clip_grad_norm_(group["params"], max_norm)

    optimizer.register_step_pre_hook(clip)
