"""The part of a picture that shows recall by depth: tables of masks, or with several contexts heat maps."""

from functools import partial
from textwrap import fill
from typing import NamedTuple

from flash_dmattn_hf.evaluation.picture_masks import height_of, label_rows, mask_name
from flash_dmattn_hf.evaluation.picture_part import Part

TITLE = "recall: prompts with all answers right (%), by depth of the asked statement"
DIGIT = 0.64
"""Width of a digit, in ems."""


class Asked(NamedTuple):
    """What recall was asked for: the tasks that have depths, and at which contexts and depths, ascending."""

    tasks: list[str]
    contexts: list[int]
    depths: list[int]


def recall_part(rows: list[dict], width: float) -> Part:
    """Returns the part for results of `recall_suite`, with a panel for each task that has depths.

    Of a single context a panel has a line for each row. Of several it has a heat map for each row: a column for each
    mask, a line for each window; dense is in the first line. width: of the picture, in inches.
    """
    cells = [cell for cell in rows[0]["recall"] if cell["depth"] is not None]
    tasks = list(dict.fromkeys(cell["task"] for cell in cells))
    asked = Asked(tasks, *(sorted({cell[name] for cell in cells}) for name in ("context", "depth")))
    if len(asked.contexts) == 1:
        cell_width = (width - 2.2) / len(tasks) / len(asked.depths)
        return Part(height_of(rows) + 0.95, partial(_tables, rows=rows, asked=asked, cell_width=cell_width))
    masks, windows = list(dict.fromkeys(map(mask_name, rows))), _windows(rows)
    cell_width = (width - 0.8) / len(tasks) / len(masks) / len(asked.contexts)
    height = len(windows) * (0.19 * len(asked.depths) + 0.65) + 0.7
    return Part(
        height, partial(_heat_maps, rows=rows, asked=asked, masks=masks, windows=windows, cell_width=cell_width)
    )


def _tables(figure, rows: list[dict], asked: Asked, cell_width: float) -> None:
    panels = figure.subplots(1, len(asked.tasks), squeeze=False)[0]
    for panel, task in zip(panels, asked.tasks, strict=True):
        grid = [[share for (share,) in _shares(row, task, asked)] for row in rows]
        _shaded(panel, grid, cell_width)
        panel.set_xticks(_middles(asked.depths), map(str, asked.depths))
        panel.set_yticks([])
        panel.tick_params(labelsize=8, length=0)
        panel.set_title(task, fontsize=9)
        panel.set_xlabel("depth (%): 0 is the start of the text", fontsize=8)
    label_rows(panels[0], rows, offset=0.5)
    figure.suptitle(f"{TITLE}, N = {asked.contexts[0]}", fontsize=10)


def _heat_maps(
    figure, rows: list[dict], asked: Asked, masks: list[str], windows: list[int | None], cell_width: float
) -> None:
    _, contexts, depths = asked
    is_tight = 72 * cell_width < 7 * DIGIT * (len(str(contexts[-1])) + 1)
    for place, task in zip(figure.subfigures(1, len(asked.tasks), squeeze=False)[0], asked.tasks, strict=True):
        panels = place.subplots(len(windows), len(masks), squeeze=False)
        used = {}
        for row in rows:
            line, column = windows.index(row["keep_window_size"] or windows[0]), masks.index(mask_name(row))
            used.setdefault(line, []).append(column)
            panel = panels[line, column]
            _shaded(panel, _shares(row, task, asked), cell_width)
            panel.set_xticks(_middles(contexts), map(str, contexts), rotation=90 if is_tight else 0)
            panel.set_yticks([])
            panel.tick_params(labelsize=7, length=0)
            panel.set_title(fill(row["mask"], int(15 * cell_width * len(contexts))), fontsize=8)
        for line, columns in used.items():
            first = panels[line, min(columns)]
            first.set_yticks(_middles(depths), map(str, depths))
            first.set_ylabel("depth (%)", fontsize=8)
            for column in set(range(len(masks))) - set(columns):
                panels[line, column].set_visible(False)
        place.suptitle(task, fontsize=9)
        place.supxlabel("context (tokens)", fontsize=8)
    figure.suptitle(TITLE, fontsize=10)


def _shaded(axis, grid: list[list[float]], cell_width: float) -> None:
    """Draws shares as shaded cells with their per cent; the first line is on top. cell_width: inches."""
    axis.pcolormesh(grid, vmin=0, vmax=1, cmap="Blues", edgecolors="0.8", linewidth=0.5)
    axis.invert_yaxis()
    style = {"fontsize": min(8, 72 * cell_width / (4 * DIGIT)), "ha": "center", "va": "center"}  # three digits at most
    for line, shares in enumerate(grid):
        for column, share in enumerate(shares):
            color = "white" if share > 0.55 else "black"
            axis.text(column + 0.5, line + 0.5, f"{100 * share:.0f}", color=color, **style)


def _shares(row: dict, task: str, asked: Asked) -> list[list[float]]:
    """The shares of prompts with all answers right of one row and task: a line for each depth, a column a context."""
    found = {(cell["depth"], cell["context"]): cell["all_right"] for cell in row["recall"] if cell["task"] == task}
    return [[found[depth, context] for context in asked.contexts] for depth in asked.depths]


def _windows(rows: list[dict]) -> list[int | None]:
    """The windows of the rows, ascending; of dense alone, None."""
    return sorted({row["keep_window_size"] for row in rows} - {None}) or [None]


def _middles(values: list[int]) -> list[float]:
    return [place + 0.5 for place in range(len(values))]
