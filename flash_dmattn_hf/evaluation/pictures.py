"""The results of the recall suite as one picture: recall by depth and context, quality against cache memory."""

from pathlib import Path

from flash_dmattn_hf.evaluation.report import merged_cells

COLUMNS = 4
COLORS = {"dense": "black", "sinks + window": "tab:gray", "importance": "tab:blue"}


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
    """Writes the picture of results of `recall_suite`, in the format of the path's ending.

    Rows without cache_bytes are left out of the panels against memory, those without a perplexity out of that panel.
    One heat map per row shows the share of prompts with all answers right, for the first task that has depths. Two
    panels below show perplexity, and the share of answers right over all tasks at the longest context, against memory.
    Raises as `check_format`.
    """
    check_format(path)
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    task = next((cell["task"] for cell in rows[0]["recall"] if cell["depth"] is not None), None)
    lines = 0 if task is None else -(-len(rows) // COLUMNS)
    heights = [2.9 * lines, 3.5] if lines else [3.5]
    figure = pyplot.figure(figsize=(3.2 * COLUMNS, sum(heights)), layout="constrained")
    parts = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    if lines:
        _heat_maps(parts[0], rows, task, lines)
    left, right = parts[-1].subplots(1, 2)
    _against_memory(left, rows, "perplexity", [row["perplexity"] for row in rows])
    longest = max(cell["context"] for cell in rows[0]["recall"])
    answers = [[cell.answers for cell in merged_cells(row) if cell.context == longest] for row in rows]
    label = f"answers right, all tasks, N = {longest}"
    _against_memory(right, rows, label, [sum(shares) / len(shares) for shares in answers])
    right.set_ylim(-0.03, 1.03)
    figure.suptitle(title, fontsize=9)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _heat_maps(figure, rows: list[dict], task: str, lines: int) -> None:
    panels = figure.subplots(lines, COLUMNS, squeeze=False).flatten()
    for panel in panels[len(rows) :]:
        panel.set_visible(False)
    for panel, row in zip(panels, rows, strict=False):
        cells = [cell for cell in row["recall"] if cell["task"] == task]
        contexts, depths = (sorted({cell[name] for cell in cells}) for name in ("context", "depth"))
        shares = {(cell["depth"], cell["context"]): cell["all_right"] for cell in cells}
        grid = [[shares[depth, context] for context in contexts] for depth in depths]
        image = panel.imshow(grid, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
        panel.set_xticks(range(len(contexts)), [str(context) for context in contexts])
        panel.set_yticks(range(len(depths)), [str(depth) for depth in depths])
        panel.set_title(row["mask"], fontsize=9)
        panel.set_xlabel("context (tokens)")
        panel.set_ylabel("depth (%)")
    figure.colorbar(image, ax=list(panels), label=f"{task}: prompts all right")


def _against_memory(axis, rows: list[dict], label: str, values: list[float]) -> None:
    points = [(row, value) for row, value in zip(rows, values, strict=True) if None not in (row["cache_bytes"], value)]
    for kind in dict.fromkeys(row["kind"] for row, _ in points):
        of_kind = [(row["cache_bytes"] / 2**20, value) for row, value in points if row["kind"] == kind]
        axis.plot(*zip(*of_kind, strict=True), "o-", color=COLORS.get(kind), label=kind)
    axis.axhline(values[0], color="black", linestyle=":", linewidth=1)
    axis.set_xlabel("key-value cache at the longest context (MiB)")
    axis.set_ylabel(label)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
