"""Perplexity of a token stream, at the same scored positions whatever the context length."""

import inspect
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F

from flash_dmattn_hf.progress import progress_bar

LOGIT_ROWS = 256
"""Rows of logits that are brought to float32 at once (a vocabulary can have 262144 entries)."""


class Perplexity(NamedTuple):
    """perplexity = exp(nll); nll: mean negative log-likelihood in nats per scored token."""

    perplexity: float
    nll: float
    num_tokens: int


def perplexity(
    model,
    input_ids: torch.Tensor,
    *,
    context_length: int,
    score_last: int | None = None,
    stretch_length: int | None = None,
    max_stretches: int | None = None,
    progress: bool | str | None = None,
) -> Perplexity:
    """Cuts `input_ids` into consecutive stretches and scores the end of each.

    Each stretch is one forward pass of batch 1 without a cache: it is given its last `context_length`
    tokens and scored on its last `score_last`. Runs that differ only in `context_length` (or in the
    model's window) therefore score the very same tokens and can be compared.

    input_ids: (N,) or (1, N) integer token ids. What is left after the last full stretch is not used.
    context_length: tokens given to the model per stretch, at least 2.
    score_last: scored tokens per stretch, 1 to context_length - 1; None is context_length // 2.
    stretch_length: tokens per stretch, at least context_length; None is context_length.
    max_stretches: use only so many, spread evenly over the text; None is all that fit.
    progress: label of a progress bar on a terminal; None draws none.
    Raises ValueError for arguments out of these ranges or a text shorter than one stretch.
    """
    score_last = context_length // 2 if score_last is None else score_last
    stretch_length = context_length if stretch_length is None else stretch_length
    stretches = cut(input_ids, stretch_length, max_stretches)
    if not 2 <= context_length <= stretch_length:
        raise ValueError(f"context_length must be from 2 to stretch_length {stretch_length}, got {context_length}")
    if not 1 <= score_last < context_length:
        raise ValueError(f"score_last must be from 1 to {context_length - 1}, got {score_last}")

    total, was_training = 0.0, model.training
    model.eval()
    try:
        for stretch in progress_bar(stretches, progress, unit="stretch"):
            total += negative_log_likelihood(model, stretch[-context_length:], score_last)
    finally:
        model.train(was_training)
    num_tokens = len(stretches) * score_last
    nll = total / num_tokens
    return Perplexity(math.exp(min(nll, 700.0)), nll, num_tokens)


def cut(input_ids: torch.Tensor, stretch_length: int, max_stretches: int | None = None) -> torch.Tensor:
    """(N,) or (1, N) token ids -> (stretches, stretch_length), `max_stretches` of them spread evenly over the text.

    Raises ValueError when not even one fits.
    """
    if input_ids.dim() == 2 and input_ids.shape[0] == 1:
        input_ids = input_ids[0]
    if input_ids.dim() != 1:
        raise ValueError(f"input_ids must have shape (N,) or (1, N), got {tuple(input_ids.shape)}")
    if max_stretches is not None and max_stretches < 1:
        raise ValueError(f"max_stretches must be at least 1, got {max_stretches}")
    count = len(input_ids) // stretch_length
    if count == 0:
        raise ValueError(f"input_ids must hold at least {stretch_length} tokens, got {len(input_ids)}")
    stretches = input_ids[: count * stretch_length].view(count, stretch_length)
    if max_stretches is None or max_stretches >= count:
        return stretches
    return stretches[[number * count // max_stretches for number in range(max_stretches)]]


@torch.no_grad()
def negative_log_likelihood(model, input_ids: torch.Tensor, score_last: int) -> float:
    """Sum over the last `score_last` tokens of -log p(token | the tokens before it). input_ids: (N,)."""
    options = {"use_cache": False}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        options["logits_to_keep"] = score_last + 1
    input_ids = input_ids.to(model.get_input_embeddings().weight.device)
    logits = model(input_ids=input_ids[None], **options).logits[0, -score_last - 1 : -1]
    targets = input_ids[-score_last:].to(logits.device)
    losses = (
        F.cross_entropy(rows.float(), target, reduction="sum")
        for rows, target in zip(logits.split(LOGIT_ROWS), targets.split(LOGIT_ROWS), strict=True)
    )
    return float(sum(loss.double() for loss in losses))
