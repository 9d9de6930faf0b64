"""The picture of `benchmark_serving.py`: throughput and times against the length of the prompts.

    python scripts/serving_picture.py figures.json picture.png      of a run that was interrupted, too
"""

import sys

from benchmark_report import load_json

PANELS = [
    ("generated tokens / s, all at once", True, {"tokens_per_s": "o-"}),
    ("s to the first token, median", False, {"first_median": "o-"}),
    ("s per token, p99 (dotted: median)", False, {"between_p99": "o-", "between_median": "o:"}),
]
"""Title, whether the rows are those of all requests at once or of Poisson arrivals, and figures with their lines."""


def draw(report: dict, path: str) -> None:
    """A panel for each of `PANELS` and a colour for each engine.

    report: what `benchmark_serving.py` writes as JSON.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in report["rows"] if row["part"] == "load" and "failed" not in row]
    figure, axes = pyplot.subplots(1, len(PANELS), figsize=(13, 3.8), layout="constrained")
    for axis, (title, is_at_once, lines) in zip(axes, PANELS, strict=True):
        for number, engine in enumerate(dict.fromkeys(row["engine"] for row in rows)):
            mine = [row for row in rows if row["engine"] == engine and (row["load"] == "all at once") == is_at_once]
            for figure_name, style in lines.items():
                points = [(row["prompt"], row[figure_name]) for row in mine if row[figure_name]]
                if points:
                    label = engine if style == "o-" else None
                    axis.loglog(*zip(*points, strict=True), style, color=f"C{number}", label=label)
        axis.set(xlabel="tokens of a prompt", title=title)
        axis.grid(True, which="both", alpha=0.3)
    axes[0].legend()
    where, settings = report["environment"], report["settings"]
    figure.suptitle(f"{where['device']}, {settings['shape']}, w = {settings['keep_window_size']} ({where['date']})")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


if __name__ == "__main__":
    draw(load_json(sys.argv[1]), sys.argv[2])
