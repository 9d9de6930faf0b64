"""The part of a picture that shows memory and quality: bars, or with several windows curves against memory."""

from functools import partial
from typing import NamedTuple

from flash_dmattn_hf.evaluation.picture_masks import height_of, label_rows, mask_name, styles
from flash_dmattn_hf.evaluation.picture_part import Part
from flash_dmattn_hf.evaluation.report import merged_cells


class Measure(NamedTuple):
    """A figure of every row.

    label: of its axis. values: one for each row; None was not measured. decimals: of the values written beside bars.
    compares: a bar starts at the value of dense. is_share: in per cent, on a scale from 0 to 100.
    """

    label: str
    values: list[float | None]
    decimals: int
    compares: bool = False
    is_share: bool = False


def quality_part(rows: list[dict]) -> Part:
    """Returns the part for results of `recall_suite`, one of them of the kind "dense".

    With several windows the points of a mask are joined, and one legend names the masks; rows without cache_bytes are
    left out. With one window all masks but dense need about the same memory, so each row has a bar for its memory and
    for each measure.
    """
    longest = max(cell["context"] for cell in rows[0]["recall"])
    measures = _measures(rows, longest)
    memory = f"key-value cache of {longest} tokens (MiB)"
    if len({row["keep_window_size"] for row in rows} - {None}) > 1:
        return Part(3.9, partial(_curves, rows=rows, measures=measures, memory=memory))
    measures.insert(0, Measure(memory, _mebibytes(rows), decimals=2))
    return Part(height_of(rows) + 1.1, partial(_bars, rows=rows, measures=measures))


def _measures(rows: list[dict], longest: int) -> list[Measure]:
    answers = [[cell.answers for cell in merged_cells(row) if cell.context == longest] for row in rows]
    shares = [100 * sum(found) / len(found) for found in answers]
    return [
        Measure("perplexity\n(lower is better)", [row["perplexity"] for row in rows], decimals=3, compares=True),
        Measure("KLD to dense, nats per token\n(lower is better)", [row["kld"] for row in rows], decimals=4),
        Measure(f"answers right, all tasks, N = {longest} (%)\n(higher is better)", shares, decimals=1, is_share=True),
    ]


def _bars(figure, rows: list[dict], measures: list[Measure]) -> None:
    of_masks, dense = styles(rows), _dense(rows)
    colors = [of_masks[mask_name(row)].color for row in rows]
    panels = figure.subplots(1, len(measures), sharey=True)
    for panel, (label, values, decimals, compares, is_share) in zip(panels, measures, strict=True):
        start = values[dense] if compares else 0.0
        lengths = [0.0 if value is None else value - start for value in values]
        bars = panel.barh(range(len(rows)), lengths, left=start, color=colors, height=0.7)
        texts = ["-" if value is None else f"{value:,.{decimals}f}" for value in values]
        panel.axvline(values[dense], color="black", linestyle=":", linewidth=1, zorder=0)
        for text in panel.bar_label(bars, texts, padding=3, fontsize=8):
            text.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 0.5})  # over the dotted line
        panel.margins(x=0.3)
        if is_share:
            panel.set_xlim(0, 119)
        panel.set_xlabel(label, fontsize=8)
        panel.tick_params(labelsize=8)
        panel.tick_params(axis="y", length=0)
        panel.spines[["top", "right"]].set_visible(False)
    label_rows(panels[0], rows)
    figure.suptitle("memory and quality (dotted: dense; -: not measured)", fontsize=10)


def _curves(figure, rows: list[dict], measures: list[Measure], memory: str) -> None:
    sizes = _mebibytes(rows)
    of_masks = styles([row for row in rows if row["cache_bytes"] is not None])
    ticks, texts = zip(*_memory_ticks(rows, sizes), strict=True)
    panels = figure.subplots(1, len(measures))
    for panel, (label, values, _, _, is_share) in zip(panels, measures, strict=True):
        for name, style in of_masks.items():
            of_mask = [place for place, row in enumerate(rows) if mask_name(row) == name]
            points = sorted((sizes[place], values[place]) for place in of_mask)
            panel.plot(*zip(*points, strict=True), "-", **style._asdict(), label=name, markersize=7)
        panel.axhline(values[_dense(rows)], color="black", linestyle=":", linewidth=1, zorder=0)
        if is_share:
            panel.set_ylim(-4, 104)
        panel.set_xscale("log", base=2)
        panel.minorticks_off()
        panel.set_xticks(ticks, texts)
        panel.set_xlabel(f"{memory}, logarithmic", fontsize=8)
        panel.set_ylabel(label, fontsize=8)
        panel.tick_params(labelsize=8)
        panel.tick_params(axis="x", labelsize=7)
        panel.grid(alpha=0.3)
    figure.suptitle("quality against memory (dotted: dense)", fontsize=10)
    figure.legend(
        *panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=6, fontsize=8, frameon=False
    )


def _mebibytes(rows: list[dict]) -> list[float | None]:
    return [row["cache_bytes"] and row["cache_bytes"] / 2**20 for row in rows]


def _dense(rows: list[dict]) -> int:
    return next(place for place, row in enumerate(rows) if row["kind"] == "dense")


def _memory_ticks(rows: list[dict], sizes: list[float | None]) -> list[tuple[float, str]]:
    """Returns the sizes of the cache with their windows, without those whose text would touch that of a larger one."""
    of_windows = {row["keep_window_size"]: size for row, size in zip(rows, sizes, strict=True) if size is not None}
    gap = (max(of_windows.values()) / min(of_windows.values())) ** (1 / 7)
    ticks = []
    for window, size in sorted(of_windows.items(), key=lambda item: -item[1]):
        if not ticks or size * gap <= ticks[-1][0]:
            ticks.append((size, f"{size:,.2f}\n" + ("dense" if window is None else f"w = {window}")))
    return ticks
