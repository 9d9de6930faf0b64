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
from torch.distributed.tensor import DTensor


class StandardizedLayer(NamedTuple):
    """layer: has a weight (out, in), and a bias (out,) or None: then the inputs are only scaled.

    mean, std: (in,), of the inputs. FSDP2 may shard the layer, by its outputs, at any time.
    """

    layer: nn.Module
    mean: torch.Tensor
    std: torch.Tensor

    def parameters(self) -> list[nn.Parameter]:
        """Returns the weight, and the bias if there is one."""
        return [parameter for parameter in (self.layer.weight, self.layer.bias) if parameter is not None]


def standardize_inputs(optimizer: torch.optim.Optimizer, layers: Sequence[StandardizedLayer]) -> None:
    """Lets an optimizer take its steps on the layers in the coordinates of standardised inputs.

    Exact for every optimizer whose weight decay is 0 for them. Hooks registered later see the gradients there.
    """
    before: list[torch.Tensor] = []

    @torch.no_grad()
    def to_standardized(*_: Any) -> None:
        before[:] = [_local(layer.weight).clone() for layer, _, _ in layers]
        for layer, mean, std in layers:
            if layer.weight.grad is None:
                continue
            gradient = _local(layer.weight.grad)
            if layer.bias is not None and layer.bias.grad is not None:
                gradient -= torch.outer(_local(layer.bias.grad), mean.to(gradient))
            gradient /= std.to(gradient)

    @torch.no_grad()
    def back(*_: Any) -> None:
        for old, (layer, mean, std) in zip(before, layers, strict=True):
            weight = _local(layer.weight)
            change = (weight - old) / std.to(weight)
            weight.copy_(old + change)
            if layer.bias is not None:
                _local(layer.bias).sub_(change @ mean.to(weight))

    optimizer.register_step_pre_hook(to_standardized)
    optimizer.register_step_post_hook(back)


def clip_each_group(optimizer: torch.optim.Optimizer, max_norm: float) -> None:
    """Clips the gradient of every parameter group to a norm of its own, before every step."""

    def clip(*_: Any) -> None:
        for group in optimizer.param_groups:
            torch.nn.utils.clip_grad_norm_(group["params"], max_norm)

    optimizer.register_step_pre_hook(clip)


def _local(tensor: torch.Tensor) -> torch.Tensor:
    """Returns this process's part of a tensor, which shares its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
