"""The picture of `benchmark_parallel.py`: speed of each GPU and its memory against the length of the sequence.

python scripts/parallel_picture.py docs/benchmarks/parallel_h200.json docs/benchmarks/parallel_h200.png
"""

import sys

from benchmark_report import load_json


def draw(path: str, report: dict) -> None:
    """A panel of tokens a second and GPU, and one of peak memory; a line per engine and number of GPUs.

    report: what `benchmark_parallel.py` writes as JSON.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in report["rows"] if "milliseconds" in row]
    lines = sorted({(row["engine"], row["num_gpus"]) for row in rows})
    figure, panels = pyplot.subplots(1, 2, figsize=(10, 4), constrained_layout=True)
    quantities = {"tokens_per_second_per_gpu": "tokens a second and GPU", "peak_gib": "peak memory of a GPU (GiB)"}
    for axis, (quantity, title) in zip(panels, quantities.items(), strict=True):
        for engine, num_gpus in lines:
            points = sorted(
                (row["tokens"], row[quantity]) for row in rows if (row["engine"], row["num_gpus"]) == (engine, num_gpus)
            )
            axis.plot(*zip(*points, strict=True), marker="o", label=f"{engine}, GPUs: {num_gpus}")
        axis.set_xscale("log", base=2)
        axis.set_ylim(bottom=0)
        axis.set_xlabel("tokens of the sequence")
        axis.set_title(title)
        axis.grid(True, alpha=0.3)
        axis.legend(fontsize=7)
    where, settings = report["environment"], report["settings"]
    figure.suptitle(f"{where['device']}, bf16, w = {settings['keep_window_size']} ({where['date']})")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


if __name__ == "__main__":
    draw(sys.argv[2], load_json(sys.argv[1]))
