"""Importances as the numbers that are compared and added to logits, and who competes with them."""

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


def priority(
    importance: torch.Tensor,
    positions: torch.Tensor,
    query_position: torch.Tensor,
    num_sink_tokens: int,
    local_window_size: int,
) -> torch.Tensor:
    """Returns what keys of a pruned set are ranked by for a query, the highest first.

    It is the importance, but +inf for sinks and local keys, which need not compete, and -inf for empty slots.

    importance: (B, Hi, n), as `comparable` returns it. positions: (B, Hi, n) integers, -1 for an empty slot.
    query_position: (B, 1, 1) or (B, Hi, 1) integers.
    """
    exempt = (positions < num_sink_tokens) | (query_position - positions < local_window_size)
    return importance.masked_fill(exempt, torch.inf).masked_fill(positions < 0, -torch.inf)
