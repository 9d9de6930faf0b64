"""The picture of `benchmark_parallel.py`: what was measured, and what `parallel_model.py` computes from it.

python scripts/parallel_picture.py docs/benchmarks/parallel_h200.json docs/benchmarks/parallel_h200.png
"""

import sys
from typing import Any

from benchmark_report import load_json
from parallel_model import GPUS, LENGTHS, NETWORK_BYTES_PER_SECOND, Model, model_of

STYLES = {
    "flash_dmattn": {"marker": "o", "markersize": 7, "linestyle": "-"},
    "sdpa": {"marker": "x", "markersize": 9, "linestyle": ":"},
}
"""Where both need the same memory, the markers of dense attention leave ours visible. Colours tell numbers of GPUs."""


def draw(path: str, report: dict[str, Any]) -> None:
    """Draws speed and peak memory as measured, and below, dashed, seconds of a step and memory as computed.

    report: what `benchmark_parallel.py` writes as JSON. Without the rows that the model needs there is no second row.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    model = model_of(report)
    size = {"nrows": 1, "figsize": (11, 4.5)} if model is None else {"nrows": 2, "figsize": (11, 9)}
    figure, panels = pyplot.subplots(ncols=2, constrained_layout=True, squeeze=False, **size)
    draw_measured(panels[0], report)
    if model is not None:
        draw_computed(panels[1], model, report)
    for row in panels:
        ticks = sorted({tokens for axis in row for line in axis.lines for tokens in line.get_xdata() if tokens > 1})
        for axis in row:
            axis.set_xscale("log", base=2)
            axis.set_xticks(ticks, [named(tokens) for tokens in ticks])
            axis.minorticks_off()
            axis.set_xlabel("tokens of the sequence")
            axis.grid(True, alpha=0.3)
            if axis.lines:
                axis.legend(fontsize=7)
    where, settings = report["environment"], report["settings"]
    figure.suptitle(f"{where['device']}, bf16, w = {settings['keep_window_size']} ({where['date']})")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def draw_measured(panels: Any, report: dict[str, Any]) -> None:
    """A panel of tokens a second and GPU, and one of peak memory; a line per engine and a colour per number of GPUs."""
    rows = [row for row in report["rows"] if "milliseconds" in row]
    lines, colours = sorted({(row["engine"], row["num_gpus"]) for row in rows}), colours_of(report)
    quantities = {"tokens_per_second_per_gpu": "tokens a second and GPU", "peak_gib": "peak memory of a GPU, GiB"}
    for axis, (quantity, title) in zip(panels, quantities.items(), strict=True):
        for engine, num_gpus in lines:
            mine = [row for row in rows if (row["engine"], row["num_gpus"]) == (engine, num_gpus)]
            points = sorted((row["tokens"], row[quantity]) for row in mine)
            style = {**STYLES[engine], "color": colours[num_gpus]}
            axis.plot(*zip(*points, strict=True), **style, label=label(engine, num_gpus))
            for row in mine:
                if "mlp_tile" in row:
                    text = f"at {named(row['tokens'])}: MLPs in tiles,\ncomputed once more"
                    place = {"xytext": (0, -70), "textcoords": "offset points", "ha": "right", "va": "top"}
                    axis.annotate(text, (row["tokens"], row[quantity]), fontsize=7, **place)
        axis.set_ylim(bottom=0)
        axis.set_title(f"measured: {title}")
    failed = [row for row in report["rows"] if "failed" in row]
    if failed:
        names = [f"{label(row['engine'], row['num_gpus'])}, {named(row['tokens'])} tokens" for row in failed]
        corner = {"transform": panels[1].transAxes, "ha": "right", "va": "bottom", "fontsize": 7}
        panels[1].text(0.98, 0.02, "without a figure: " + "; ".join(names), **corner)


def draw_computed(panels: Any, model: Model, report: dict[str, Any]) -> None:
    """A panel of seconds of a step, and one of peak memory, for more GPUs than were measured.

    What was measured on several GPUs stands beside what is computed for as many.
    """
    seconds, memory = panels
    rows, colours = measured_on_several(report), colours_of(report)
    for num_gpus in sorted({row["num_gpus"] for row in rows} | set(GPUS)):
        colour = colours[num_gpus]
        ours = [model.seconds(tokens, num_gpus) for tokens in LENGTHS]
        seconds.plot(LENGTHS, ours, "--", color=colour, label=f"computed, {label('flash_dmattn', num_gpus)}")
        found = [(row["tokens"], row["milliseconds"] / 1e3) for row in rows if row["num_gpus"] == num_gpus]
        if found:
            name = f"measured, {label('flash_dmattn', num_gpus)}"
            seconds.plot(*zip(*sorted(found), strict=True), "o", color=colour, label=name)
        if model.ring is not None:
            ring = [model.ring_seconds(tokens, num_gpus) for tokens in LENGTHS]
            seconds.plot(LENGTHS, ring, ":", color=colour, label=f"computed, sdpa ring, {num_gpus} GPUs")
        if model.memory is not None:
            peaks = [model.peak_gib(tokens, num_gpus) for tokens in LENGTHS]
            memory.plot(LENGTHS, peaks, "--", color=colour, label=f"computed, {num_gpus} GPUs")
    if report.get("memory_gib"):
        memory.axhline(report["memory_gib"], color="grey", label="that a GPU has")
        memory.set_ylim(0, 2 * report["memory_gib"])
    seconds.set_yscale("log")
    network = f"{NETWORK_BYTES_PER_SECOND / 1e9:.0f} GB/s between hosts assumed"
    ring = "" if model.ring is not None else "; no line of the ring: too few rows"
    seconds.set_title(f"COMPUTED from the parts: seconds of a step\n({network}{ring})", fontsize=10)
    memory.set_title("COMPUTED: peak memory of a GPU, GiB, MLPs in tiles", fontsize=10)


def print_computed(model: Model) -> None:
    """Prints the computed figures as a table of Markdown."""
    print("| GPUs | tokens | computed: s a step | sdpa ring | GiB of a GPU |", "| --- " * 5 + "|", sep="\n")
    for num_gpus in GPUS:
        for tokens in LENGTHS[3::2]:
            ring = "" if model.ring is None else f"{model.ring_seconds(tokens, num_gpus):.1f}"
            memory = "" if model.memory is None else f"{model.peak_gib(tokens, num_gpus):.0f}"
            print(f"| {num_gpus} | {tokens} | {model.seconds(tokens, num_gpus):.1f} | {ring} | {memory} |")


def print_compared(model: Model, report: dict[str, Any]) -> None:
    """Prints what the model computes for the rows on several GPUs, beside what they took, as a table of Markdown."""
    print("| GPUs | tokens | measured: s a step | computed | |", "| --- " * 5 + "|", sep="\n")
    for row in measured_on_several(report):
        found, computed = row["milliseconds"] / 1e3, model.seconds(row["tokens"], row["num_gpus"])
        ratio = f"{found / computed - 1:+.0%} measured"
        print(f"| {row['num_gpus']} | {row['tokens']} | {found:.2f} | {computed:.2f} | {ratio} |")


def measured_on_several(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns our rows of more than one GPU."""
    ours = [row for row in report["rows"] if row["engine"] == "flash_dmattn" and "milliseconds" in row]
    return [row for row in ours if row["num_gpus"] > 1]


def colours_of(report: dict[str, Any]) -> dict[int, str]:
    """Returns the colour of every number of GPUs, measured or computed: the same in all panels."""
    counts = sorted({row["num_gpus"] for row in report["rows"]} | set(GPUS))
    return {count: f"C{number}" for number, count in enumerate(counts)}


def label(engine: str, num_gpus: int) -> str:
    return f"{engine}, {num_gpus} GPU{'s' if num_gpus > 1 else ''}"


def named(tokens: float) -> str:
    """Such as 256K and 4M."""
    for unit, size in (("M", 2**20), ("K", 2**10)):
        if tokens >= size and tokens % size == 0:
            return f"{tokens / size:.0f}{unit}"
    return f"{tokens:.0f}"


if __name__ == "__main__":
    given = load_json(sys.argv[1])
    draw(sys.argv[2], given)
    if (found := model_of(given)) is not None:
        print_computed(found)
        print_compared(found, given)
