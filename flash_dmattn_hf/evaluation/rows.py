"""The rows that a model is compared in: dense, sinks + window, and its own importance, at several windows."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import NamedTuple

from torch import nn

from flash_dmattn_hf.conversion.variants import dense, with_window, without_importance
from flash_dmattn_hf.gates.attach import iter_gates

TRAINED_WINDOW = "sinks + window, trained"
"""The kind of a model that was trained with sinks and a window: the control of one trained with importance."""


class Row(NamedTuple):
    """label: for tables. keep_window_size: None for dense. kind: "dense", "sinks + window", "importance", or another
    that a caller tells apart, such as `TRAINED_WINDOW`.
    model: to be measured inside `variant`, which can be entered once."""

    label: str
    kind: str
    keep_window_size: int | None
    model: nn.Module
    variant: AbstractContextManager


def rows_of(model: nn.Module, windows: Sequence[int], baseline: nn.Module | None = None) -> list[Row]:
    """Returns the rows of a table.

    baseline: a converted model to take dense and sinks + window from, with the sinks of `model`; None is `model`.
    """
    num_sinks = next(iter_gates(model))[2].config.num_sink_tokens
    baseline = model if baseline is None else baseline
    rows = [Row("dense", "dense", None, baseline, dense(baseline))]
    for window in windows:
        plain = sinks_and_window(baseline, window, min(num_sinks, window))
        rows.append(Row(f"sinks + window, w = {window}", "sinks + window", window, baseline, plain))
        rows.append(Row(f"importance, w = {window}", "importance", window, model, with_window(model, window)))
    return rows


@contextmanager
def sinks_and_window(model: nn.Module, window: int, num_sinks: int) -> Iterator[None]:
    """Inside the block a converted model sees its first and newest tokens, whatever its importance."""
    with with_window(model, window, num_sink_tokens=num_sinks), without_importance(model):
        yield
