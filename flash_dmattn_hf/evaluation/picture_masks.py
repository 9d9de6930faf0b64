"""How a picture names the masks and tells them apart."""

from textwrap import fill
from typing import NamedTuple

COLORS = ("#0072B2", "#D55E00", "#332288", "#E69F00", "#88CCEE", "#661100", "#DDCC77", "#882255")
"""Any two differ, and from black, grey and white, also as the colour-blind see them."""
MARKERS = "sD^vP*X"


class Style(NamedTuple):
    color: str
    marker: str


def mask_name(row: dict) -> str:
    """Returns the label of a row without its window: the same for all windows of a mask."""
    return row["mask"].removesuffix(f", w = {row['keep_window_size']}")


def styles(rows: list[dict]) -> dict[str, Style]:
    """Returns a style for each `mask_name`. Two differ, for up to 56 masks beside dense and sinks + window."""
    kinds = {mask_name(row): row["kind"] for row in rows}
    fixed = {"dense": Style("black", "o"), "sinks + window": Style("#8C8C8C", "o")}
    others = [name for name, kind in kinds.items() if kind not in fixed]
    return {name: fixed[kind] if kind in fixed else _cycled(others.index(name)) for name, kind in kinds.items()}


def _cycled(index: int) -> Style:
    return Style(COLORS[index % len(COLORS)], MARKERS[index % len(MARKERS)])


def label_rows(axis, rows: list[dict], offset: float = 0.0) -> None:
    """Names the rows from the top down, the first at `offset` on the y axis of `axis`."""
    axis.set_yticks([index + offset for index in range(len(rows))], [_wrapped(row) for row in rows])
    axis.set_ylim(len(rows) - 0.5 + offset, -0.5 + offset)


def height_of(rows: list[dict]) -> float:
    """Returns the inches that `label_rows` needs for all rows."""
    return len(rows) * (0.08 + 0.14 * max(_wrapped(row).count("\n") + 1 for row in rows))


def _wrapped(row: dict) -> str:
    return "\n".join(fill(part, 34) for part in row["mask"].replace(" (", "\n(").split("\n"))
