"""The tables of docs/results.md and README.md, each from the result files of one or a few parts of the suite."""

from collections.abc import Callable
from pathlib import Path

from benchmark_report import load_json

PARTS = {
    "summary": ("attention", "model_training", "decode"),
    "attention": ("attention",),
    "attention_triton": ("attention_triton",),
    "distributions": ("attention_distributions",),
    "flex": ("attention_flex",),
    "host_time": ("host_time",),
    "shapes": ("attention_d64", "attention_d256", "attention_deterministic"),
    "selection": ("selection",),
    "model": ("model_training", "model_prefill"),
    "decode": ("decode",),
    "soft_training": ("soft_training",),
}
"""The parts of the suite that a block is written from."""

MIB, GIB = 2**20, 2**30
LONGEST = 131072


class Results:
    """One result file, and what a page says about it."""

    def __init__(self, folder: Path, part: str, gpu: str, prefix: str):
        self.name = f"{part}_{gpu}"
        content = load_json(folder / f"{self.name}.json")
        self.rows = content["rows"]
        self.where = content.get("environment", content)
        self.has_picture = (folder / f"{self.name}.png").exists()
        self.prefix = prefix

    @property
    def device(self) -> str:
        """Such as "NVIDIA H100"."""
        return " ".join(self.where["device"].split()[:2])

    def find(self, figure: str, **names) -> float | None:
        """Returns a figure of the row with these names, None if there is none or it failed."""
        for row in self.rows:
            if names.items() <= row.items():
                return row.get(figure)
        return None

    def lengths(self, **names) -> list[int]:
        return sorted({row["seqlen"] for row in self.rows if names.items() <= row.items()})

    def link(self) -> str:
        """The file, its picture, and where it comes from."""
        path = f"{self.prefix}benchmarks/{self.name}"
        picture = f", [picture]({path}.png)" if self.has_picture else ""
        origin = f"{self.device}, {self.where['date']}, commit {self.where['commit']}"
        return f"[{self.name}.json]({path}.json){picture}: {origin}."


def write_summary(attention: Results, training: Results, decode: Results) -> str:
    lines = [f"| {attention.device}, w = 2048, bfloat16 | ours | dense | |", "| --- | --- | --- | --- |"]
    for work in ("forward", "backward"):
        ours, dense = (
            attention.find("milliseconds", seqlen=LONGEST, engine=engine, work=work) for engine in ("cuda", "cudnn")
        )
        lines.append(
            f"| attention {work}, 128K tokens | {number(ours)} ms | {number(dense)} ms (cuDNN) | {times(ours, dense)} |"
        )
    ours, dense = (
        training.find("milliseconds", seqlen=LONGEST, engine=engine) / 1e3 for engine in ("flash_dmattn", "sdpa-cudnn")
    )
    lines.append(
        f"| forward and backward of a 1B model, 128K tokens | {number(ours)} s | {number(dense)} s (cuDNN) "
        f"| {times(ours, dense)} |"
    )
    step = {"shape": "1b", "batch": 1, "context": 2**20}
    ours, dense = (decode.find("milliseconds", **step, engine=engine) for engine in ("flash_dmattn", "dense-static"))
    lines.append(
        f"| one token at a context of 1M, 1B model | {ours:.2f} ms | {number(dense)} ms (StaticCache) "
        f"| {times(ours, dense)} |"
    )
    ours, dense = (decode.find("cache_bytes", **step, engine=engine) for engine in ("flash_dmattn", "dense-static"))
    lines.append(
        f"| cache at a context of 1M, 1B model | {ours / MIB:.0f} MiB | {dense / GIB:.0f} GiB | {times(ours, dense)} |"
    )
    if attention.has_picture:
        picture = f"{attention.prefix}benchmarks/{attention.name}.png"
        lines += ["", f"![time and memory against the sequence length]({picture})"]
    return "\n".join(lines)


def write_attention(results: Results, engine: str = "cuda") -> str:
    lines = ["| N | forward, ms | dense | | backward, ms | dense | |", "| --- | --- | --- | --- | --- | --- | --- |"]
    for seqlen in results.lengths(engine=engine):
        cells = [f"{seqlen:,}"]
        for work in ("forward", "backward"):
            ours, dense = (
                results.find("milliseconds", seqlen=seqlen, engine=name, work=work) for name in (engine, "cudnn")
            )
            cells += [number(ours), number(dense), times(ours, dense)]
        lines.append(table_row(cells))
    return "\n".join([*lines, "", results.link()])


def write_triton(results: Results) -> str:
    return write_attention(results, "triton")


def write_distributions(results: Results) -> str:
    found = {
        (engine, work): spread(
            [row["milliseconds"] for row in results.rows if (row["engine"], row["work"]) == (engine, work)]
        )
        for engine in ("cuda", "triton")
        for work in ("forward", "backward")
    }
    return (
        f"At 32K the CUDA forward takes {found['cuda', 'forward']} ms and the backward {found['cuda', 'backward']} ms "
        "for random, autocorrelated, drifting\nand constant importance. "
        f"Triton takes {found['triton', 'forward']} and {found['triton', 'backward']} ms, with the library's selection "
        f"and lists.\n\n{results.link()}"
    )


def write_flex(results: Results) -> str:
    forward, backward = (
        results.find("milliseconds", seqlen=32768, engine="flex", work=work) for work in ("forward", "backward")
    )
    return (
        f"At 32K its forward takes {forward:.0f} ms, and its backward with the gradient of the importance "
        f"{backward:.0f} ms.\n\n{results.link()}"
    )


def write_host_time(results: Results) -> str:
    lines = [
        "| N | work | host, us | dense | time, ms | dense | |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    titles = {
        "forward": "forward",
        "both": "forward and backward",
        "decode": "one token",
        "long way": "forward, no plan",
    }
    for seqlen in results.lengths(engine="flash_dmattn"):
        for work, title in titles.items():
            cells = [f"{seqlen:,}", title]
            for figure in ("host_microseconds", "milliseconds"):
                pair = [
                    results.find(figure, seqlen=seqlen, engine=engine, work=work)
                    for engine in ("flash_dmattn", "cudnn")
                ]
                cells += [f"{x:.0f}" if x and figure == "host_microseconds" else number(x) for x in pair]
            lines.append(table_row([*cells, times(*pair)]))
    return "\n".join([*lines, "", results.link()])


def write_shapes(d64: Results, d256: Results, deterministic: Results) -> str:
    lines = [
        "| N = 32,768 | forward, ms | dense | | backward, ms | dense | | forward kernel, useful TFLOP/s |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    titles = {
        "32:8 heads of 64": d64,
        "16:4 heads of 256": d256,
        "32:8 heads of 128, `deterministic=True`": deterministic,
    }
    for title, results in titles.items():
        cells = [title]
        for work in ("forward", "backward"):
            ours, dense = (results.find("milliseconds", engine=engine, work=work) for engine in ("cuda", "cudnn"))
            cells += [number(ours), number(dense), times(ours, dense)]
        lines.append(table_row([*cells, f"{results.find('useful_tflops', engine='cuda', work='kernel'):.0f}"]))
    return "\n".join([*lines, "", d64.link(), d256.link(), deterministic.link()])


def write_selection(results: Results) -> str:
    lines = [
        "| N | importance | selection, ms | in a CUDA graph | key lists, ms | in a CUDA graph |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    figures = ("milliseconds", "graph_milliseconds", "lists_milliseconds", "lists_graph_milliseconds")
    for row in results.rows:
        cells = [f"{row['seqlen']:,}", row["importance"], *(number(row.get(figure)) for figure in figures)]
        lines.append(table_row(cells))
    return "\n".join([*lines, "", results.link()])


def write_soft_training(results: Results) -> str:
    lines = [
        "| sequences x tokens | dense, ms | sinks and window | hard mask | soft cut | soft to hard | soft to dense |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for seqlen in results.lengths():
        found = [results.find("median_ms", seqlen=seqlen, kind=kind) for kind in ("dense", "window", "hard", "soft")]
        batch = results.find("batch", seqlen=seqlen)
        ratios = [times(found[2], found[3]), times(found[0], found[3])]
        lines.append(table_row([f"{batch} x {seqlen:,}", *(f"{each:.0f}" for each in found), *ratios]))
    return "\n".join([*lines, "", results.link()])


def write_model(training: Results, prefill: Results) -> str:
    lines = ["| | ours | dense | |", "| --- | --- | --- | --- |"]
    for seqlen in training.lengths():
        ours, cudnn, flash = (
            training.find("milliseconds", seqlen=seqlen, engine=engine)
            for engine in ("flash_dmattn", "sdpa-cudnn", "sdpa-flash")
        )
        own_peak, peak = (
            training.find("peak_gib", seqlen=seqlen, engine=engine) for engine in ("flash_dmattn", "sdpa-cudnn")
        )
        lines.append(
            f"| forward and backward, {seqlen // 1024}K tokens | {number(ours / 1e3)} s, {own_peak:.1f} GiB "
            f"| {number(cudnn / 1e3)} s (cuDNN), {number(flash / 1e3)} s (flash), {peak:.1f} GiB "
            f"| {times(ours, cudnn)}, {times(ours, flash)} |"
        )
    last = [row for row in prefill.rows if "context" in row][-1]
    lines.append(
        f"| prefill of {last['context'] // 2**20}M tokens in chunks of 32K | {number(last['seconds'])} s, "
        f"{last['peak_gib']:.1f} GiB, a cache of {last['cache_bytes'] / MIB:.0f} MiB "
        f"| its cache alone: {last['dense_cache_bytes'] / GIB:.0f} GiB | |"
    )
    return "\n".join([*lines, "", training.link(), prefill.link()])


def write_decode(results: Results) -> str:
    lines = ["| | ours | dense | |", "| --- | --- | --- | --- |"]
    pairs = {
        "CUDA graph": ("flash_dmattn", "dense-static", "StaticCache"),
        "kernel by kernel": ("flash_dmattn-eager", "dense-dynamic", "DynamicCache"),
    }
    for way, (ours_name, dense_name, cache) in pairs.items():
        for batch, context in ((1, 4096), (1, 2**20), (64, 4096)):
            step = {"shape": "1b", "batch": batch, "context": context}
            ours, dense = (results.find("milliseconds", **step, engine=engine) for engine in (ours_name, dense_name))
            length = "1M" if context == 2**20 else "4K"
            lines.append(
                f"| batch {batch}, context of {length}, {way} | {ours:.2f} ms | {number(dense)} ms ({cache}) "
                f"| {times(ours, dense)} |"
            )
    return "\n".join([*lines, "", results.link()])


WRITERS: dict[str, Callable[..., str]] = {
    "summary": write_summary,
    "attention": write_attention,
    "attention_triton": write_triton,
    "distributions": write_distributions,
    "flex": write_flex,
    "host_time": write_host_time,
    "shapes": write_shapes,
    "selection": write_selection,
    "model": write_model,
    "decode": write_decode,
    "soft_training": write_soft_training,
}


def table_row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |".replace("|  |", "| |").replace("|  |", "| |")


def number(value: float | None) -> str:
    """Two decimals below 1, one above; nothing for None."""
    if value is None:
        return ""
    return f"{value:.2f}" if value < 1 else f"{value:.1f}"


def times(ours: float | None, dense: float | None) -> str:
    """How many times ours the dense figure is."""
    if ours is None or dense is None:
        return ""
    return f"{dense / ours:.1f}x" if dense < 10 * ours else f"{dense / ours:.0f}x"


def spread(values: list[float]) -> str:
    return f"{min(values):.2f} to {max(values):.2f}"
