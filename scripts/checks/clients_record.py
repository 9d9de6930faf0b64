"""Plugin of pytest that writes what came of tests/clients, for scripts/checks/clients.sh."""

import datetime
import os
import platform
import subprocess
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

LIBRARIES = (
    "torch transformers accelerate safetensors trl datasets peft lm_eval sentence-transformers torchao bitsandbytes "
    "deepspeed fastapi uvicorn openai pytest"
).split()
ROOT = Path(__file__).resolve().parents[2]


def pytest_addoption(parser: Any) -> None:
    parser.addoption("--clients-record", help="file that becomes the record")
    parser.addoption("--clients-command", help="what the record says that it was written by")


def pytest_terminal_summary(terminalreporter: Any, config: Any) -> None:
    """Writes the record, whatever came of the tests."""
    lines = [*_header(config.getoption("--clients-command")), "", *_outcomes(terminalreporter.stats)]
    Path(config.getoption("--clients-record")).write_text("\n".join(lines) + "\n", encoding="utf-8")


def _header(command: str) -> Iterator[str]:
    yield "# tests/clients on a CPU, each compared with sdpa where the window covers the sequence"
    values = {
        "command": command,
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": _commit(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        **{name: _version(name) for name in LIBRARIES},
    }
    for name, value in values.items():
        yield f"{name:22} {value}"


def _commit() -> str:
    """Returns the commit that is checked out, and whether files differ from it, other than results of measurements."""
    commit = _git("rev-parse", "--short=12", "HEAD")
    changed = _git("status", "--porcelain", "--", ".", ":!docs/benchmarks")
    return f"{commit}, with changes that are not committed" if changed else commit


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def _outcomes(stats: dict[str, list]) -> Iterator[str]:
    """Yields one line for each test, in the order in which they ran, and one with the sums."""
    for kind in ("passed", "failed", "error", "skipped"):
        for report in stats.get(kind, []):
            yield f"{kind:8} {report.nodeid.removeprefix('tests/clients/')}{_reason(kind, report)}"
    yield ", ".join(f"{len(stats.get(kind, []))} {kind}" for kind in ("passed", "failed", "error", "skipped"))


def _reason(kind: str, report: Any) -> str:
    if kind == "passed":
        return f"  {report.duration:.0f} s"
    if kind == "skipped":
        return f": {report.longrepr[2].removeprefix('Skipped: ')}"
    return f": {report.longrepr.reprcrash.message.splitlines()[0]}" if hasattr(report.longrepr, "reprcrash") else ""
