"""The picture of `benchmark_serving.py`: throughput and times against the length of the prompts."""

PANELS = {
    "tokens_per_s": ("all at once", "generated tokens / s, all requests at once"),
    "first_median": (None, "time to first token, median (s), under load"),
    "between_p99": (None, "time per token (s), median and p99, under load"),
}
"""Figure -> the load of its rows, None for that of Poisson arrivals, and the label."""


def draw(report: dict, path: str) -> None:
    """A panel per figure and a line per engine.

    report: what `benchmark_serving.py` writes as JSON.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in report["rows"] if row["part"] == "load" and "failed" not in row]
    figure, axes = pyplot.subplots(1, len(PANELS), figsize=(13, 3.8), layout="constrained")
    for axis, (name, (load, label)) in zip(axes, PANELS.items(), strict=True):
        for engine in dict.fromkeys(row["engine"] for row in rows):
            mine = [row for row in rows if row["engine"] == engine and (row["load"] == "all at once") == bool(load)]
            for quantity, style in ((name, "o-"), ("between_median", "o:"))[: 2 if name == "between_p99" else 1]:
                points = [(row["prompt"], row[quantity]) for row in mine if row[quantity]]
                if points:
                    axis.loglog(*zip(*points, strict=True), style, label=f"{engine}, {quantity.split('_')[-1]}")
        axis.set(xlabel="tokens of a prompt", title=label)
        axis.grid(True, which="both", alpha=0.3)
        axis.legend(fontsize=8)
    where, settings = report["environment"], report["settings"]
    figure.suptitle(f"{where['device']}, w = {settings['keep_window_size']} ({where['date']})")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
