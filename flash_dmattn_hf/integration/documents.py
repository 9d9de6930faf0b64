"""Packed documents: where they begin according to position_ids, and which rows of a batch they are."""

from typing import NamedTuple

import torch


class Documents(NamedTuple):
    """Documents that lie one after another in the B * S tokens of all batch rows.

    bounds: (num_docs + 1,) int32, where they begin and end.
    padding_mask: (1, B * S) bool, True for real tokens; None if all are.
    """

    bounds: torch.Tensor
    padding_mask: torch.Tensor | None = None


def mark_documents(position_ids: torch.Tensor, padding_mask: torch.Tensor | None = None) -> torch.Tensor:
    """Returns the document number of every token, (B, T) int64; for padding the complement (`~`) of that before it.

    position_ids: (B, T). padding_mask: (B, T) bool, True for real tokens, None if all are.

    A document starts where the position falls back from one real token to the next. Gaps, strides and repeated
    positions start none, except one: in a row of documents that count by 1, a 0 after a 0 follows a document of
    one token.
    """
    is_real = torch.ones_like(position_ids, dtype=torch.bool) if padding_mask is None else padding_mask
    before, distance = _before(position_ids, is_real)
    step = position_ids - before
    counts = (step != 0) & (step <= distance) | (position_ids == 0) | ~is_real  # padding may be counted or not
    is_count = counts.all(-1, keepdim=True) & (is_real & (position_ids > 0)).any(-1, keepdim=True)
    starts = (step < 0) | (is_count & (position_ids == 0) & (before == 0))
    numbers = (starts & is_real).cumsum(-1)
    return torch.where(is_real, numbers, ~numbers)


def has_documents(numbers: torch.Tensor) -> torch.Tensor:
    """Whether any row of `mark_documents` holds more than one document; a bool tensor without dimensions."""
    return (numbers > 0).any()


def _before(position_ids: torch.Tensor, is_real: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the position of the real token before each token, for the first its own minus 1, and how far it is."""
    columns = torch.arange(position_ids.shape[1], device=position_ids.device)
    last_real = torch.where(is_real, columns, -1).cummax(-1).values
    last_real = torch.where(columns == 0, -1, last_real.roll(1, dims=1))  # a slice would need three tokens to export
    before = torch.where(last_real < 0, position_ids - 1, position_ids.gather(1, last_real.clamp(min=0)))
    return before, torch.where(last_real < 0, 1, columns - last_real)


def documents_of(numbers: torch.Tensor) -> Documents:
    """Returns the documents of a batch, numbered in each row as by `mark_documents`; numbers: (B, S) int64.

    While compiling all tokens must be real, and bounds has B * S + 1 entries, those behind the last document equal.
    """
    padding_mask = None
    if not torch.compiler.is_compiling() and bool((numbers < 0).any()):
        padding_mask = (numbers >= 0).reshape(1, -1)
        numbers = torch.where(numbers < 0, ~numbers, numbers)
    is_first = torch.arange(numbers.shape[1], device=numbers.device) == 0
    starts = (numbers != numbers.roll(1, dims=1)) | is_first
    order = starts.flatten().cumsum(0) - 1
    num_bounds = order.shape[0] + 1 if torch.compiler.is_compiling() else int(order[-1]) + 2
    bounds = torch.searchsorted(order, torch.arange(num_bounds, device=order.device))
    return Documents(bounds.to(torch.int32), padding_mask)
