"""How near the predictions of a model are to those of the dense one: KL divergence, top-1 agreement, loss."""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from flash_dmattn_hf.conversion.variants import dense
from flash_dmattn_hf.evaluation.final_states import FinalStates, evaluating
from flash_dmattn_hf.evaluation.perplexity import cut
from flash_dmattn_hf.gates.attach import text_config_of
from flash_dmattn_hf.progress import progress_bar

LOGITS = 2**26
"""Logits of either model that exist at once; with their logarithms and probabilities 2 GB in float32."""


class Agreement(NamedTuple):
    """Means over the same `num_rows` rows.

    kld: KL(reference || model) in nats per token. top1: share of rows with the same likeliest token.
    loss, reference_loss: negative log-likelihood of the text in nats per token.
    """

    kld: float
    top1: float
    loss: float
    reference_loss: float
    num_rows: int

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))


def agreement(
    model: nn.Module,
    input_ids: torch.Tensor,
    *,
    context_length: int,
    first_row: int,
    reference: nn.Module | None = None,
    reference_mode: Callable[[], AbstractContextManager] | None = None,
    leading: Sequence[int] = (),
    max_stretches: int | None = None,
    chunk_size: int | None = None,
    progress: bool | str | None = None,
) -> Agreement:
    """Compares a model with a dense reference on rows `first_row` to `context_length - 2` of each stretch of a text.

    Row t sees tokens 0 to t and predicts token t + 1; with first_row = w only rows that a window of w keys can change
    are compared. Both models run once per stretch, and on one token for every `chunk_size` rows, whose logits exist at
    a time.

    input_ids: (N,) or (1, N) integer token ids, cut into consecutive stretches. What is left over is not used.
    context_length: tokens per forward pass, those of `leading` included. first_row: 0 to context_length - 2.
    reference: a model with the same vocabulary, run with dense attention; None is `model` itself.
    reference_mode: a context manager inside which the reference is run instead, such as one that turns an adapter off.
    leading: special token ids in front of every stretch, as from `leading_tokens`.
    chunk_size: None is as many rows as make `LOGITS` logits.
    max_stretches: use only so many, spread evenly over the text; None is all that fit.
    progress: label of a progress bar; None draws none.
    Logarithms are taken in float32, in float64 for float64 logits.
    Raises ValueError for arguments out of these ranges, a text shorter than one stretch or another vocabulary.
    """
    if not 0 <= first_row <= context_length - 2:
        raise ValueError(f"first_row must be from 0 to context_length - 2 = {context_length - 2}, got {first_row}")
    if chunk_size is None:
        chunk_size = max(1, LOGITS // text_config_of(model).vocab_size)
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
    if len(leading) >= context_length:
        raise ValueError(f"leading must have fewer than {context_length} tokens, got {len(leading)}")
    stretches = cut(input_ids, context_length - len(leading), max_stretches)
    stretches = torch.cat([torch.tensor([list(leading)] * len(stretches)).long(), stretches.cpu()], 1)
    sums = torch.zeros(4, dtype=torch.float64)
    reference = model if reference is None else reference
    with evaluating(model), evaluating(reference):
        for stretch in progress_bar(stretches, progress, unit="stretch"):
            with dense(reference) if reference_mode is None else reference_mode():
                expected = FinalStates(reference, stretch)
            found = FinalStates(model, stretch)
            for start in range(first_row, context_length - 1, chunk_size):
                rows = slice(start, min(start + chunk_size, context_length - 1))
                targets = stretch[rows.start + 1 : rows.stop + 1]
                sums += _compare(expected.logits(rows), found.logits(rows), targets).cpu()
    num_rows = len(stretches) * (context_length - 1 - first_row)
    return Agreement(*(sums / num_rows).tolist(), num_rows)


def share_of_gap(loss: float, window_loss: float, dense_loss: float) -> float | None:
    """Returns (window_loss - loss) / (window_loss - dense_loss): 0 is sinks + window, 1 is dense.

    None when the dense model is not better than sinks + window, so that there is no gap.
    """
    return (window_loss - loss) / (window_loss - dense_loss) if window_loss > dense_loss else None


def _compare(expected: torch.Tensor, found: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Returns the sums over rows of KL, equal likeliest tokens, loss and reference loss, (4,) float64."""
    if expected.shape != found.shape:
        raise ValueError(
            f"reference must have the vocabulary of model, {found.shape[-1]} tokens, got {expected.shape[-1]}"
        )
    expected, targets = expected.to(found.device), targets.to(found.device)
    same = (expected.argmax(-1) == found.argmax(-1)).sum()
    expected, found = (_log_softmax(logits) for logits in (expected, found))
    probability = expected.exp()
    # a token that the reference rules out counts for nothing, even if both logits are -inf
    divergence = torch.where(probability > 0, probability * (expected - found), 0.0).sum()
    losses = [F.nll_loss(logs, targets, reduction="sum") for logs in (found, expected)]
    return torch.stack([part.double() for part in (divergence, same, *losses)])


def _log_softmax(logits: torch.Tensor) -> torch.Tensor:
    return torch.log_softmax(logits, -1, dtype=torch.float64 if logits.dtype == torch.float64 else torch.float32)
