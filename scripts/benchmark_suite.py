"""Measures every public figure of speed in one go, and says what has moved since the committed ones.

    python scripts/benchmark_suite.py                     on one GPU, less than 8 minutes
    python scripts/benchmark_suite.py --parts attention host_time
    python scripts/benchmark_suite.py --quick             on a CPU, small: only to see that it works

Each part is a benchmark of this folder, in a process of its own. Its result goes to FOLDER/PART.json and is compared
with docs/benchmarks/PART_GPU.json, row by row, where that was measured on such a GPU with the same settings. Parts are
in the order of their weight. What does not fit into the time that is left is left out, and named. The folder is taken
over into docs/ by scripts/write_results.py.

Figures of quality are not speed: scripts/quality_table.py, scripts/demo.py and scripts/benchmark_mqar.py have those.
"""

import argparse
import importlib.util
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmark_report import REPOSITORY, gpu_name, load_json

COMMITTED = REPOSITORY / "docs" / "benchmarks"
FOLDER = REPOSITORY / "build" / "benchmark_suite"

FIGURES = {
    "milliseconds",
    "host_microseconds",
    "microseconds",
    "median_ms",
    "seconds",
    "graph_milliseconds",
    "lists_milliseconds",
    "lists_graph_milliseconds",
    "peak_mib",
    "peak_gib",
    "cache_bytes",
}
"""Times and memory; the less the better. Rates and ratios follow from them."""

NAMES = ("shape", "kind", "batch", "seqlen", "context", "keep_window_size", "importance", "engine", "work", "tokens")
"""What tells one row of a file from the others."""

FREE_SETTINGS = {
    *("seqlens", "contexts", "batches", "shapes", "engines", "importance", "context"),  # rows that are there or not
    *("runs", "dense_runs", "steps", "calls", "dense_limit", "flash_limit", "no_kernel", "memory_bandwidth"),
}
"""Settings that may differ between two runs whose rows are compared."""


@dataclass(frozen=True)
class Part:
    """A benchmark of the suite.

    arguments: the script and its options. quick: its options on a CPU, None: it needs a GPU.
    has_picture: it draws one, where matplotlib is installed. without_library: the CUDA library is turned off.
    """

    name: str
    arguments: str
    quick: str | None = None
    has_picture: bool = False
    without_library: bool = False

    def command(self, path: Path, is_quick: bool) -> list[str]:
        script, *options = self.arguments.split()
        if is_quick:
            options = self.quick.split()
        elif self.has_picture and importlib.util.find_spec("matplotlib"):
            options += ["--png", str(path.with_suffix(".png"))]
        return [sys.executable, str(REPOSITORY / "scripts" / script), *options, "--json", str(path)]


_SMALL = "--device cpu --seqlens 64 128 --num-heads 4 --num-kv-heads 2 --head-dim 32 --keep-window-size 64"
PARTS = (
    Part(
        "attention",
        "benchmark_attention.py --engines cuda cudnn --runs 5 --seqlens 2048 4096 8192 32768 131072 1048576",
        f"{_SMALL} --engines reference cudnn --runs 1",
        has_picture=True,
    ),
    Part("host_time", "benchmark_host_time.py", f"{_SMALL} --calls 1"),
    Part("model_training", "benchmark_model.py train"),
    Part(
        "decode",
        "benchmark_decode.py --shapes 1b --batches 1 64 --contexts 4096 1048576 --steps 8",
        has_picture=True,
    ),
    Part("attention_d64", "benchmark_attention.py --engines cuda cudnn --head-dim 64 --seqlens 32768 --runs 5"),
    Part(
        "attention_d256",
        "benchmark_attention.py --engines cuda cudnn --head-dim 256 --num-heads 16 --num-kv-heads 4 --seqlens 32768 "
        "--runs 5",
    ),
    Part("attention_deterministic", "benchmark_attention.py --engines cuda --deterministic --seqlens 32768 --runs 5"),
    Part(
        "selection",
        "benchmark_selection.py --seqlens 4096 131072 1048576 --importance iid drift",
        "--device cpu --seqlens 64 128 --keep-window-size 64 --runs 1",
    ),
    Part("soft_training", "benchmark_soft_training.py --seqlens 4096 8192 32768 --warmup 2 --runs 4"),
    Part("model_prefill", "benchmark_model.py prefill"),
    Part(
        "attention_triton",
        "benchmark_attention.py --engines triton cudnn --runs 3 --seqlens 4096 8192 32768 131072 1048576",
        has_picture=True,
        without_library=True,
    ),
    Part(
        "attention_distributions",
        "benchmark_attention.py --engines cuda triton --seqlens 32768 --importance iid ar1 drift constant --runs 5",
    ),
    Part("attention_flex", "benchmark_attention.py --engines cuda flex --seqlens 32768 --runs 3"),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=[part.name for part in PARTS], help="only these")
    parser.add_argument("--quick", action="store_true", help="small, on a CPU, what can run there")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="for the results, emptied of older ones")
    parser.add_argument("--committed", type=Path, default=COMMITTED, help="results to compare with")
    parser.add_argument("--threshold", type=float, default=3.0, help="percent that a figure may move without a word")
    parser.add_argument("--seconds", type=float, default=470.0, help="for all parts together")
    arguments = parser.parse_args()
    if not arguments.quick and not torch.cuda.is_available():
        parser.error("a CUDA GPU is needed, or --quick")

    parts = [part for part in PARTS if arguments.parts is None or part.name in arguments.parts]
    arguments.folder.mkdir(parents=True, exist_ok=True)
    for old in (*arguments.folder.glob("*.json"), *arguments.folder.glob("*.png")):
        old.unlink()
    start, failed, left_out, said = time.perf_counter(), [], [], []
    for part in parts:
        left = arguments.seconds - (time.perf_counter() - start)
        if (arguments.quick and part.quick is None) or left <= 0:
            left_out.append(part.name)
            continue
        path = arguments.folder / f"{part.name}.json"
        if not run(part, path, arguments.quick, left):
            failed.append(part.name)
        if path.exists():
            said += compare_files(part.name, path, arguments.committed, arguments.threshold)
    print(f"\n{time.perf_counter() - start:.0f} s in all. Moved by more than {arguments.threshold:g} %:")
    print("\n".join(said) or "nothing")
    for name, names in (("failed", failed), ("left out", left_out)):
        if names:
            print(f"{name}: {', '.join(names)}")
    return 1 if failed else 0


def run(part: Part, path: Path, is_quick: bool, seconds: float) -> bool:
    """Runs a part with its output shown. Returns whether it succeeded within that time."""
    command = part.command(path, is_quick)
    print(f"\n== {part.name}: {' '.join(command[1:])}", flush=True)
    environment = dict(os.environ)
    if part.without_library:
        environment["FLASH_DMATTN_DISABLE_CUDA"] = "1"
    start = time.perf_counter()
    try:
        code = subprocess.run(command, env=environment, timeout=seconds).returncode
    except subprocess.TimeoutExpired:
        code = "no time left"
    print(f"== {part.name}: {'done' if code == 0 else f'failed ({code})'} in {time.perf_counter() - start:.0f} s")
    return code == 0


def compare_files(name: str, path: Path, committed: Path, threshold: float) -> list[str]:
    """Returns a line for each figure that has moved, or one that says why none is compared."""
    new = load_json(path)
    gpu = gpu_name(_environment(new)["device"])
    old_path = committed / f"{name}_{gpu}.json"
    if not old_path.exists():
        return [f"{name}: there is no {old_path.name} to compare with"]
    old = load_json(old_path)
    differing = differing_settings(old, new)
    if differing:
        return [f"{name}: not compared with {old_path.name}, whose settings differ: {', '.join(differing)}"]
    return [f"{name}: {line}" for line in compare_rows(old, new, threshold)]


def differing_settings(old: dict, new: dict) -> list[str]:
    """Returns the settings that decide what a row means and are not the same."""
    sides = [content.get("settings", content) for content in (old, new)]
    shared = (sides[0].keys() & sides[1].keys()) - FREE_SETTINGS
    numbers = (int, float, bool, type(None))
    return sorted(name for name in shared if isinstance(sides[0][name], numbers) and sides[0][name] != sides[1][name])


def compare_rows(old: dict, new: dict, threshold: float) -> list[str]:
    """Returns a line for each figure of a row that moved by more than `threshold` percent, or failed in one of both."""
    before = {_name(row): row for row in _rows(old)}
    lines = []
    for row in _rows(new):
        known = before.get(_name(row))
        if known is None:
            continue
        name = " ".join(map(str, (value for _, value in _name(row))))
        if row.get("failed") != known.get("failed"):
            lines.append(f"{name}: {known.get('failed', 'worked')} before, {row.get('failed', 'works')} now")
        for figure in sorted(FIGURES & row.keys() & known.keys()):
            was, now = known[figure], row[figure]
            if was and now and abs(now / was - 1) * 100 > threshold:
                lines.append(f"{name} {figure}: {was:.4g} before, {now:.4g} now, {100 * (now / was - 1):+.1f} %")
    return lines


def _rows(content: dict) -> list[dict]:
    return [*content.get("kernel", []), *content["rows"]]


def _name(row: dict) -> tuple:
    return tuple((name, row[name]) for name in NAMES if name in row)


def _environment(content: dict) -> dict:
    return content.get("environment", content)


if __name__ == "__main__":
    sys.exit(main())
