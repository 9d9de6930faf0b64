"""Importances as the numbers that are compared and added to logits."""

import torch


def comparable(importance: torch.Tensor) -> torch.Tensor:
    """Maps importances to the float32 (or float64) numbers that are compared and added as bias.

    NaN becomes -inf, +inf the largest float32, -0.0 becomes +0.0. Differentiable; what was not finite gets no
    gradient. Shape and device are kept.
    """
    if importance.dtype != torch.float64:
        importance = importance.float()
    largest = torch.finfo(torch.float32).max
    return torch.nan_to_num(importance, nan=-torch.inf, posinf=largest, neginf=-torch.inf) + 0.0
