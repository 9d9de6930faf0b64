"""Attention sinks: a learned logit per head that takes a share of every softmax and gives nothing for it."""

import torch


def check_sinks(sinks: torch.Tensor, num_heads: int, name: str) -> None:
    """Raises ValueError unless there is one sink logit per query head of a layer of this name."""
    if sinks.shape != (num_heads,):
        raise ValueError(f"s_aux of {name} must have shape ({num_heads},), got {tuple(sinks.shape)}")


def with_sinks(out: torch.Tensor, lse: torch.Tensor, sinks: torch.Tensor) -> torch.Tensor:
    """Returns out * sigmoid(lse - sinks): exp(sinks) is added to what each query's softmax divides by.

    out: (B, T, H, D). lse: (B, H, T) natural-log sum of exp of the logits of the visible keys. sinks: (H,). Returns
    (B, T, H, D) in out's dtype. A query that sees no key keeps its 0.
    """
    share = torch.sigmoid(lse - sinks.to(lse.dtype)[:, None])  # (B, H, T)
    return (out * share.transpose(1, 2).unsqueeze(-1)).to(out.dtype)
