"""The picture of `benchmark_parallel.py`: what was measured, and what `parallel_model.py` computes from it.

python scripts/parallel_picture.py docs/benchmarks/parallel_h200.json docs/benchmarks/parallel_h200.png
"""

import sys
from typing import Any

from benchmark_report import load_json
from parallel_model import GPUS, LENGTHS, NETWORK_BYTES_PER_SECOND, Model, model_of


def draw(path: str, report: dict[str, Any]) -> None:
    """Draws speed and peak memory as measured, and below, dashed, seconds of a step and memory as computed.

    report: what `benchmark_parallel.py` writes as JSON. Without the rows that the model needs there is no second row.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    model = model_of(report)
    size = {"nrows": 1, "figsize": (10, 4)} if model is None else {"nrows": 2, "figsize": (10, 8)}
    figure, panels = pyplot.subplots(ncols=2, constrained_layout=True, squeeze=False, **size)
    draw_measured(panels[0], report)
    if model is not None:
        draw_computed(panels[1], model, report.get("memory_gib"))
    for axis in panels.flatten():
        axis.set_xscale("log", base=2)
        axis.set_xlabel("tokens of the sequence")
        axis.grid(True, alpha=0.3)
        if axis.lines:
            axis.legend(fontsize=7)
    where, settings = report["environment"], report["settings"]
    figure.suptitle(f"{where['device']}, bf16, w = {settings['keep_window_size']} ({where['date']})")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def draw_measured(panels: Any, report: dict[str, Any]) -> None:
    """A panel of tokens a second and GPU, and one of peak memory; a line per engine and number of GPUs."""
    rows = [row for row in report["rows"] if "milliseconds" in row]
    lines = sorted({(row["engine"], row["num_gpus"]) for row in rows})
    quantities = {"tokens_per_second_per_gpu": "tokens a second and GPU", "peak_gib": "peak memory of a GPU (GiB)"}
    for axis, (quantity, title) in zip(panels, quantities.items(), strict=True):
        for engine, num_gpus in lines:
            points = sorted(
                (row["tokens"], row[quantity]) for row in rows if (row["engine"], row["num_gpus"]) == (engine, num_gpus)
            )
            axis.plot(*zip(*points, strict=True), marker="o", label=f"{engine}, GPUs: {num_gpus}")
        axis.set_ylim(bottom=0)
        axis.set_title(f"measured: {title}")


def draw_computed(panels: Any, model: Model, memory_gib: float | None) -> None:
    """A panel of seconds of a step, and one of peak memory, for more GPUs than were measured."""
    seconds, memory = panels
    for num_gpus in GPUS:
        ours = [model.seconds(tokens, num_gpus) for tokens in LENGTHS]
        (line,) = seconds.plot(LENGTHS, ours, "--", label=f"flash_dmattn, GPUs: {num_gpus}")
        if model.ring is not None:
            ring = [model.ring_seconds(tokens, num_gpus) for tokens in LENGTHS]
            seconds.plot(LENGTHS, ring, ":", color=line.get_color(), label=f"sdpa ring, GPUs: {num_gpus}")
        if model.memory is not None:
            peaks = [model.peak_gib(tokens, num_gpus) for tokens in LENGTHS]
            memory.plot(LENGTHS, peaks, "--", label=f"GPUs: {num_gpus}")
    if memory_gib:
        memory.axhline(memory_gib, color="grey", label="of one GPU")
    seconds.set_yscale("log")
    network = f"{NETWORK_BYTES_PER_SECOND / 1e9:.0f} GB/s between hosts"
    seconds.set_title(f"COMPUTED from the parts: seconds of a step\n(assumed: {network})", fontsize=10)
    memory.set_title("COMPUTED: peak memory of a GPU (GiB)", fontsize=10)


def print_computed(model: Model) -> None:
    """Prints the computed figures as a table of Markdown."""
    print("| GPUs | tokens | computed: s a step | sdpa ring | GiB of a GPU |", "| --- " * 5 + "|", sep="\n")
    for num_gpus in GPUS:
        for tokens in LENGTHS[3::2]:
            ring = "" if model.ring is None else f"{model.ring_seconds(tokens, num_gpus):.1f}"
            memory = "" if model.memory is None else f"{model.peak_gib(tokens, num_gpus):.0f}"
            print(f"| {num_gpus} | {tokens} | {model.seconds(tokens, num_gpus):.1f} | {ring} | {memory} |")


if __name__ == "__main__":
    given = load_json(sys.argv[1])
    draw(sys.argv[2], given)
    if (found := model_of(given)) is not None:
        print_computed(found)
