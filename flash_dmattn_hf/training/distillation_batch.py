"""One batch of a distillation: its examples stacked, the weights of its tokens, and its loss."""

from typing import Any

import torch

from flash_dmattn_hf.parallel.context import ContextParallel
from flash_dmattn_hf.training.deferred_logits import DeferredLogits
from flash_dmattn_hf.training.distillation_loss import Distillation, TokenWeights, chunked_distillation_loss


def collate(examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Stacks examples of equal length."""
    return {name: torch.stack([torch.as_tensor(example[name]) for example in examples]) for name in examples[0]}


def weights_of_tokens(weights: torch.Tensor, context: ContextParallel | None) -> TokenWeights:
    """Returns the weights of the tokens that are here, (N,), so that every example counts the same.

    weights: (B, S), of whole examples, of which a rank of `context` has a part of the tokens. What it divides by makes
    the mean over the ranks that of the whole.
    """
    weights = weights * weights.shape[1] / weights.sum(1, keepdim=True).clamp_min(1e-9)
    rank, size = (0, 1) if context is None else (context.rank, context.world_size)
    own = weights.chunk(size, 1)[rank].flatten()
    return TokenWeights(own, weights.sum() / size, (weights > 0).sum() / size)


def loss_of_batch(found: DeferredLogits, expected: DeferredLogits, weights: TokenWeights | None) -> Distillation:
    """Returns the loss of a batch, from what a model and its teacher predict; weights: None: every token counts 1."""
    names = ("hidden", "weight", "bias")
    return chunked_distillation_loss(
        **dict(zip(names, found.operands(), strict=True)),
        **{f"teacher_{name}": tensor for name, tensor in zip(names, expected.operands(), strict=True)},
        operations=found.operations,
        teacher_operations=expected.operations,
        token_weights=weights,
    )
