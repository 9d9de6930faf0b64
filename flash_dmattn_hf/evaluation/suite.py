"""The recall suite: recall, perplexity, agreement with dense and cache memory of every row, in one run."""

from collections.abc import Sequence

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase as Tokenizer

from flash_dmattn_hf.evaluation.agreement import Agreement, agreement, share_of_gap
from flash_dmattn_hf.evaluation.memory import cache_bytes
from flash_dmattn_hf.evaluation.prompts import Prompt
from flash_dmattn_hf.evaluation.recall import RecallCell, recall
from flash_dmattn_hf.evaluation.rows import TRAINED_WINDOW, Row, rows_of
from flash_dmattn_hf.gates.attach import iter_gates


def recall_suite(
    model: nn.Module,
    input_ids: torch.Tensor,
    prompts: Sequence[Prompt],
    *,
    windows: Sequence[int],
    context_length: int,
    teacher: nn.Module | None = None,
    leading: Sequence[int] = (),
    max_stretches: int | None = None,
    generate_with: Tokenizer | None = None,
    progress: bool = False,
) -> list[dict]:
    """Measures dense, and for each window sinks + window and the model, on the same prompts and the same tokens.

    model: a converted model. input_ids, context_length, leading, max_stretches: as for `agreement`, on rows beyond
    the largest window. prompts, generate_with: as for `recall`. windows: sizes of keep_window_size.
    teacher: a converted model to take dense and sinks + window from, such as the one before training; None is `model`.
    Returns one dict per row, of values that JSON can hold: mask, kind, keep_window_size, cache_bytes (after
    context_length tokens, in the dtype of the weights), num_rows, loss, perplexity, kld, top1, share_of_gap (None where
    there is none), recall.
    Raises ValueError for a model without gates or a context that no window is shorter than.
    """
    if next(iter_gates(model), None) is None:
        raise ValueError(f"model must be converted, got a {type(model).__name__} without an importance gate")
    if context_length < max(windows) + 2:
        raise ValueError(
            f"the longest context must be at least {max(windows) + 2} tokens, for rows beyond the largest window of "
            f"{max(windows)} keys, got {context_length}"
        )
    results = [
        measure_row(
            row,
            input_ids,
            prompts,
            context_length=context_length,
            first_row=max(windows),
            reference=teacher,
            leading=leading,
            max_stretches=max_stretches,
            generate_with=generate_with,
            progress=progress,
        )
        for row in rows_of(model, windows, teacher)
    ]
    add_shares_of_gap(results)
    return results


def measure_row(
    row: Row,
    input_ids: torch.Tensor,
    prompts: Sequence[Prompt],
    *,
    context_length: int,
    first_row: int,
    reference: nn.Module | None = None,
    leading: Sequence[int] = (),
    max_stretches: int | None = None,
    generate_with: Tokenizer | None = None,
    progress: bool = False,
) -> dict:
    """Returns the dict of one row, as `recall_suite` does, still without its share_of_gap.

    reference: the model whose dense attention is compared with; None is the row's own.
    """
    label = f"{row.label}, " if progress else None
    with row.variant:
        near = agreement(
            row.model,
            input_ids,
            context_length=context_length,
            first_row=first_row,
            reference=reference,
            leading=leading,
            max_stretches=max_stretches,
            progress=label and label + "agreement",
        )
        size = cache_bytes(row.model, input_ids.flatten()[:context_length])
        cells = recall(row.model, prompts, generate_with=generate_with, progress=label and label + "recall")
    return _result(row, near, size, cells)


def _result(row: Row, near: Agreement, size: int, cells: list[RecallCell]) -> dict:
    return {
        "mask": row.label,
        "kind": row.kind,
        "keep_window_size": row.keep_window_size,
        "cache_bytes": size,
        "num_rows": near.num_rows,
        "loss": near.loss,
        "perplexity": near.perplexity,
        "kld": near.kld,
        "top1": near.top1,
        "recall": [cell._asdict() for cell in cells],
    }


def add_shares_of_gap(results: list[dict]) -> None:
    """Adds to each row its share of its window's gap, from sinks + window to dense.

    Where a row of the kind `TRAINED_WINDOW` has the same window, share_of_control_gap is that of the gap it leaves.
    """
    losses = {(row["kind"], row["keep_window_size"]): row["loss"] for row in results}
    for row in results:
        window_loss = losses.get(("sinks + window", row["keep_window_size"]))
        dense_loss = losses["dense", None]
        row["share_of_gap"] = None if window_loss is None else share_of_gap(row["loss"], window_loss, dense_loss)
        control_loss = losses.get((TRAINED_WINDOW, row["keep_window_size"]))
        if control_loss is not None:
            row["share_of_control_gap"] = share_of_gap(row["loss"], control_loss, dense_loss)
