"""The picture of `benchmark_decode.py`: tokens a second and bytes of cache against the length of the context."""


def draw(path: str, report: dict) -> None:
    """A line of panels per shape: one of speed for every batch size, one of memory for the smallest batch.

    report: what `benchmark_decode.py` writes as JSON.
    """
    where, settings, rows = report["environment"], report["settings"], report["rows"]
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shapes, batches = settings["shapes"], settings["batches"]
    size = (4 * (len(batches) + 1), 3.6 * len(shapes))
    figure, axes = pyplot.subplots(len(shapes), len(batches) + 1, figsize=size, squeeze=False, constrained_layout=True)
    for panels, shape in zip(axes, shapes, strict=True):
        mine = [row for row in rows if row["shape"] == shape and "failed" not in row]
        for axis, batch in zip(panels, batches, strict=False):
            rows_of_batch = [row for row in mine if row["batch"] == batch]
            axis.set_visible(bool(rows_of_batch))  # an interrupted run has none
            _lines(axis, settings["engines"], rows_of_batch, "tokens_per_second", 1)
            axis.set_title(f"{shape}, batch {batch}: tokens a second")
        _lines(
            panels[-1], settings["engines"], [row for row in mine if row["batch"] == batches[0]], "cache_bytes", 2**20
        )
        panels[-1].set_title(f"{shape}, batch {batches[0]}: cache (MiB)")
    figure.suptitle(f"{where['device']}, bf16, w = {settings['keep_window_size']} ({where['date']})")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _lines(axis, engines: list[str], rows: list[dict], quantity: str, unit: float) -> None:
    for engine in engines:
        points = [(row["context"], row[quantity] / unit) for row in rows if row["engine"] == engine]
        if points:
            axis.loglog(*zip(*points, strict=True), marker="o", label=engine)
    axis.set_xlabel("context (tokens)")
    axis.grid(True, which="both", alpha=0.3)
    axis.legend(fontsize=7)
