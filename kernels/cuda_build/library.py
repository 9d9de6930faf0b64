"""Compiles and links the library: writes a ninja file and runs ninja, which rebuilds what changed."""

import shlex
import subprocess
from dataclasses import dataclass
from pathlib import Path

from cuda_build.settings import Settings
from cuda_build.terminal import say, show_progress
from cuda_build.toolkit import Toolkit, keep_supported
from cuda_build.units import EXPORTS, SOURCES, Unit, list_units

LIBRARY_NAME = "libflash_dmattn_cuda.so"

_FLAGS = "-O3 -std=c++17 --expt-relaxed-constexpr -Xptxas -v -Xcompiler -fPIC,-Wall,-Wno-unknown-pragmas"
_RULES = """\
ninja_required_version = 1.8

rule compile
  command = $nvcc $flags $options -MD -MF $out.d -c $in -o $out > $out.log 2>&1 || (cat $out.log; exit 1)
  depfile = $out.d
  deps = gcc
  description = nvcc $out

rule link
  command = $nvcc -shared -cudart static -Xlinker --version-script=$exports -Xlinker -z,defs -o $out $in
  description = link $out
"""


@dataclass(frozen=True)
class Build:
    """A finished build. folder: of the objects `UNIT.o`, their compiler output `UNIT.o.log` and `.ninja_log`."""

    library: Path
    folder: Path
    units: list[Unit]
    architectures: tuple[str, ...]


def build_library(
    settings: Settings, toolkit: Toolkit, folder: Path, sources: Path = SOURCES, link: bool = True
) -> Build:
    """Builds the library in `folder`, saying what and with what. Drops architectures that nvcc lacks, and says so.

    `link=False` only compiles. The next build in the same folder compiles what has changed.

    Raises RuntimeError when no architecture is left or the compiler fails; its output is printed.
    """
    architectures, dropped = keep_supported(settings, toolkit)
    if dropped:
        say(f"{toolkit.nvcc} does not know {_names(dropped)}; left out")
    if not architectures:
        raise RuntimeError(f"{toolkit.nvcc} knows none of the wanted architectures {_names(dropped)}")
    units = list_units(settings, architectures, sources)
    say(
        f"{len(units)} compilations for {_names(architectures)} with {toolkit.nvcc}, {settings.max_jobs} at a time, "
        f"{settings.why}"
    )
    folder = folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "build.ninja").write_text(ninja_file(units, toolkit, settings))
    command = [str(toolkit.ninja), "-C", str(folder), "-j", str(settings.max_jobs), LIBRARY_NAME if link else "objects"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as ninja:
        show_progress(ninja.stdout)
    if ninja.returncode != 0:
        raise RuntimeError(
            "the CUDA library could not be compiled, see above; FLASH_DMATTN_SKIP_CUDA_BUILD=1 installs without it"
        )
    return Build(folder / LIBRARY_NAME, folder, units, architectures)


def ninja_file(units: list[Unit], toolkit: Toolkit, settings: Settings) -> str:
    """Returns the text of build.ninja, whose targets lie in its own folder."""
    threads = f" --threads {settings.nvcc_threads}" if settings.nvcc_threads > 1 else ""
    lines = [
        f"nvcc = {_escape(shlex.quote(str(toolkit.nvcc)))}",
        f"exports = {_escape(shlex.quote(str(EXPORTS)))}",
        f"flags = {_FLAGS}{threads}",
        _RULES,
    ]
    for unit in units:
        options = [*map(_code_option, unit.architectures)]
        options += [_escape(shlex.quote(f"-D{define}")) for define in unit.defines]
        lines += [f"build {unit.name}.o: compile {_escape(unit.source)}", f"  options = {' '.join(options)}"]
    objects = " ".join(f"{unit.name}.o" for unit in units)
    lines += [f"build {LIBRARY_NAME}: link {objects} | {_escape(EXPORTS)}", f"build objects: phony {objects}", ""]
    return "\n".join(lines)


def _code_option(architecture: str) -> str:
    number = "90a" if architecture == "90" else architecture
    return f"-gencode arch=compute_{number},code=sm_{number}"


def _names(architectures: tuple[str, ...]) -> str:
    return ", ".join(f"sm_{name}" for name in architectures)


def _escape(text: Path | str) -> str:
    return str(text).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")
