"""The results of the recall suite as one picture: recall by depth and context above, quality against memory below."""

from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING

from flash_dmattn_hf.evaluation.picture_quality import quality_part
from flash_dmattn_hf.evaluation.picture_recall import recall_part

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDTH = 12.3
"""Inches; 1599 pixels at the 130 dots per inch of a saved picture."""


def check_format(path: Path) -> None:
    """Raises ImportError without matplotlib, ValueError for an ending that it cannot write."""
    try:
        from matplotlib.backend_bases import FigureCanvasBase
    except ImportError as error:
        raise ImportError("a picture needs the package matplotlib: pip install matplotlib") from error
    formats = sorted(FigureCanvasBase.filetypes)
    if path.suffix[1:].lower() not in formats:
        raise ValueError(f"a picture must end in one of {formats}, got {path.name}")


def draw(rows: list[dict], path: Path, title: str) -> None:
    """Writes the picture of results of `recall_suite`, as `figure_of` makes it, in the format of the path's ending.

    Raises as `check_format`.
    """
    check_format(path)
    figure_of(rows, title).savefig(path, dpi=130)
    if path.suffix.lower() == ".png":
        from PIL import Image  # matplotlib writes PNG files with it

        with Image.open(path) as image:
            few_colors = image.convert("RGB").quantize(256)
        few_colors.save(path, optimize=True)  # less than half the bytes


def figure_of(rows: list[dict], title: str) -> "Figure":
    """Returns the figure of results of `recall_suite`, one of them of the kind "dense".

    Above, for every task that has depths: a heat map of depth and context for each row, or with a single context one
    table of masks and depths. Without such a task there is nothing above. Below: memory and quality as bars, or with
    several windows perplexity, KLD and recall against memory.
    """
    from matplotlib.figure import Figure  # not pyplot, which would choose a backend for the whole process

    parts = [quality_part(rows)]
    if any(cell["depth"] is not None for cell in rows[0]["recall"]):
        parts.insert(0, recall_part(rows, WIDTH))
    heights = [part.height for part in parts]
    figure = Figure(figsize=(WIDTH, sum(heights) + 0.4), layout="constrained")
    places = figure.subfigures(len(parts), 1, height_ratios=heights, squeeze=False)[:, 0]
    for part, place in zip(parts, places, strict=True):
        part.draw(place)
    figure.suptitle(fill(title, 170), fontsize=9)
    return figure
