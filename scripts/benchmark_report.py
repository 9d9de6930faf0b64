"""What the benchmarks share: the header that says where figures come from, timing, and the JSON file.

An "engine" of a benchmark is one of the things compared: a backend of flash_dmattn, or an attention of torch.
"""

import datetime
import importlib.metadata
import json
import os
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch

REPOSITORY = Path(__file__).resolve().parent.parent


def environment(device: str) -> dict:
    """Returns device, versions, commit and date of this run."""
    if device == "cuda":
        name = torch.cuda.get_device_name()
    else:
        name = f"{_cpu_model()}, {torch.get_num_threads()} threads"
    return {
        "device": name,
        "date": datetime.date.today().isoformat(),
        "commit": _commit(),
        "kernels for": os.environ.get("FLASH_DMATTN_CUDA_ARCH"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{package: _version(package) for package in ("transformers", "triton", "flash-dmattn-hf")},
    }


def header(report: dict) -> str:
    return ", ".join(f"{name} {value}" if name != "device" else value for name, value in report.items() if value)


def median_milliseconds(function: Callable[[], object], device: str, runs: int = 5, warmup: int = 1) -> float:
    """Returns the median time of one call, in milliseconds.

    On a GPU by events around calls that follow each other without waiting, as the layers of a model do.
    """
    for _ in range(warmup):
        function()
    if device == "cuda":
        events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(runs)]
        for start, end in events:
            start.record()
            function()
            end.record()
        torch.cuda.synchronize()
        return statistics.median(start.elapsed_time(end) for start, end in events)
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        function()
        times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times)


def gpu_name(device: str) -> str:
    """Returns what result files call a device: h200 for "NVIDIA H200", cpu for what is no NVIDIA GPU."""
    model = re.search(r"\b[A-Z]*\d\d+\w*", device)
    return model[0].lower() if device.startswith("NVIDIA") and model else "cpu"


def save_json(path: str | Path, content: dict) -> None:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n")


def load_json(path: str | Path) -> dict:
    return json.loads(Path(path).read_text())


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Returns the checkout's commit; GIT_COMMIT says it where a copy of the files runs without its history."""
    if "GIT_COMMIT" in os.environ:
        return os.environ["GIT_COMMIT"]
    command = ["git", "-C", str(REPOSITORY), "describe", "--always", "--dirty", "--abbrev=10"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
