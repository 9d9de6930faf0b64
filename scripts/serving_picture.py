"""The picture of `benchmark_serving.py`: throughput and times against the length of the prompts.

    python scripts/serving_picture.py figures.json picture.png      of a run that was interrupted, too
"""

import sys

from benchmark_report import load_json
from serving_load import number_of_requests

PANELS = [
    ("generated tokens / s, all at once", True, {"tokens_per_s": "o-"}),
    ("s to the first token, median", False, {"first_median": "o-"}),
    ("s per token, p99 (dotted: median)", False, {"between_p99": "o-", "between_median": "o:"}),
]
"""Title, whether the rows are those of all requests at once or of Poisson arrivals, and figures with their lines."""


def draw(report: dict, path: str) -> None:
    """A panel for each of `PANELS` and a colour for each engine; hollow points are of rows that were cut off.

    report: what `benchmark_serving.py` writes as JSON.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in report["rows"] if row["part"] == "load" and "failed" not in row]
    hollow = [row for row in rows if is_cut_off(row, report["settings"])]
    figure, axes = pyplot.subplots(1, len(PANELS), figsize=(13, 3.8), layout="constrained")
    for axis, (title, is_at_once, lines) in zip(axes, PANELS, strict=True):
        for number, engine in enumerate(dict.fromkeys(row["engine"] for row in rows)):
            mine = [row for row in rows if row["engine"] == engine and (row["load"] == "all at once") == is_at_once]
            for figure_name, style in lines.items():
                points = [(row["prompt"], row[figure_name]) for row in mine if row[figure_name]]
                cut = [(row["prompt"], row[figure_name]) for row in mine if row[figure_name] and row in hollow]
                if points:
                    label, color = engine if style == "o-" else None, f"C{number}"
                    axis.loglog(*zip(*points, strict=True), style, color=color, label=label)
                if cut:
                    axis.loglog(*zip(*cut, strict=True), "o", color=color, markerfacecolor="white", zorder=3)
        axis.set(xlabel="tokens of a prompt", title=title)
        axis.grid(True, which="both", alpha=0.3)
    axes[0].plot([], [], "o", color="gray", markerfacecolor="white", label="cut off: its time was over")
    axes[0].legend()
    where, settings = report["environment"], report["settings"]
    figure.suptitle(f"{where['device']}, {settings['shape']}, w = {settings['keep_window_size']} ({where['date']})")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def is_cut_off(row: dict, settings: dict) -> bool:
    """Whether a row's time was over before all its requests had finished, in older reports, too."""
    return row["finished"] < number_of_requests(row["prompt"], settings["requests"], settings["tokens"])


if __name__ == "__main__":
    draw(load_json(sys.argv[1]), sys.argv[2])
