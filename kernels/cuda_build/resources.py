"""What the compiled kernels need: time, registers, shared memory and spills, from the output of the compiler."""

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

from cuda_build.library import Build

ALLOWED_SPILLS = Path(__file__).with_name("allowed_spills.txt")

_ENTRY = re.compile(r"Compiling entry function '(\S+)' for 'sm_(\w+)'")
_SPILLS = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers")
_SHARED = re.compile(r"(\d+) bytes smem")


@dataclass(frozen=True)
class Kernel:
    """Needs of one kernel for one architecture; of a template the largest of its instances in the unit.

    shared: bytes of shared memory besides what is asked for at launch. spills: bytes written by spills.
    """

    unit: str
    architecture: str
    name: str
    registers: int
    shared: int
    spills: int


def read_resources(build: Build) -> list[Kernel]:
    """Reads the needs of all kernels of a build, by unit, architecture and name."""
    largest: dict[tuple[str, str, str], Kernel] = {}
    for unit in build.units:
        for kernel in parse_compiler_output(unit.name, (build.folder / f"{unit.name}.o.log").read_text()):
            place = (kernel.unit, kernel.architecture, kernel.name)
            seen = largest.get(place, kernel)
            largest[place] = Kernel(
                *place,
                max(seen.registers, kernel.registers),
                max(seen.shared, kernel.shared),
                max(seen.spills, kernel.spills),
            )
    return [largest[place] for place in sorted(largest, key=lambda place: (place[0], int(place[1].rstrip("a")), place))]


def parse_compiler_output(unit: str, text: str) -> list[Kernel]:
    """Returns one entry per compiled kernel instance that `ptxas -v` reports in `text`."""
    parts = _ENTRY.split(text)[1:]
    symbols, architectures, reports = parts[::3], parts[1::3], parts[2::3]
    kernels = []
    for name, architecture, report in zip(_short_names(symbols), architectures, reports, strict=True):
        used, spilled, shared = (pattern.search(report) for pattern in (_USED, _SPILLS, _SHARED))
        if used is None or spilled is None:
            raise RuntimeError(f"the compiler reports no registers or spills for {name} of {unit}")
        kernels.append(Kernel(unit, architecture, name, int(used[1]), int(shared[1]) if shared else 0, int(spilled[1])))
    return kernels


def compile_seconds(build: Build) -> dict[str, float]:
    """Returns the seconds that each unit took when it was last compiled."""
    seconds = {}
    for line in (build.folder / ".ninja_log").read_text().splitlines()[1:]:
        start, end, _, output, _ = line.split("\t")
        seconds[output.removesuffix(".o")] = (int(end) - int(start)) / 1000
    return {unit.name: seconds[unit.name] for unit in build.units}


def format_table(kernels: list[Kernel], seconds: dict[str, float]) -> str:
    """Returns the table: one line per kernel and architecture, then one per unit with its time."""
    unit_width = max(len(name) for name in seconds)
    name_width = max([len(kernel.name) for kernel in kernels] + [6])
    lines = [
        f"{'unit':{unit_width}}  arch  {'kernel':{name_width}}  registers  static smem  spill bytes",
        *(
            f"{kernel.unit:{unit_width}}  {kernel.architecture:>4}  {kernel.name:{name_width}}"
            f"  {kernel.registers:9}  {kernel.shared:11}  {kernel.spills:11}"
            for kernel in kernels
        ),
        "",
        f"{'unit':{unit_width}}  seconds",
        *(f"{name:{unit_width}}  {duration:7.1f}" for name, duration in seconds.items()),
        f"{'total':{unit_width}}  {sum(seconds.values()):7.1f}",
    ]
    return "\n".join(line.rstrip() for line in lines) + "\n"


def find_spill_regressions(kernels: list[Kernel], allowed: str) -> list[str]:
    """Returns a line for every kernel that spills more than `allowed` grants: lines "UNIT ARCH KERNEL BYTES"."""
    granted = {}
    for line in allowed.splitlines():
        if line.strip() and not line.startswith("#"):
            unit, architecture, name, spills = line.split()
            granted[unit, architecture, name] = int(spills)
    regressions = []
    for kernel in kernels:
        limit = granted.get((kernel.unit, kernel.architecture, kernel.name), 0)
        if kernel.spills > limit:
            regressions.append(
                f"{kernel.name} of {kernel.unit} for sm_{kernel.architecture} spills {kernel.spills} bytes, "
                f"{limit} are allowed"
            )
    return regressions


def _short_names(symbols: list[str]) -> list[str]:
    """Returns function names without namespaces, template arguments and parameters."""
    if not symbols:
        return []
    command = ["c++filt", "-p"]  # comes with the linker
    done = subprocess.run(command, input="\n".join(symbols), capture_output=True, text=True, check=True)
    return [_strip_templates(name).split("::")[-1].split()[-1] for name in done.stdout.splitlines()]


def _strip_templates(name: str) -> str:
    depth, kept = 0, []
    for character in name.replace("(anonymous namespace)", "anonymous"):
        depth += character == "<"
        if depth == 0:
            kept.append(character)
        depth -= character == ">"
    return "".join(kept).split("(")[0].strip()
