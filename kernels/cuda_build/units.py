"""What is compiled: every source below kernels/csrc is one translation unit.

Large kernels are instantiated in small files, one per head dim and dtype, in a folder of the kernel's name:
forward_sm90/d128_bf16.cu. A folder or file whose name contains _sm90 is compiled for that architecture only.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from cuda_build.settings import Settings

KERNELS = Path(__file__).resolve().parent.parent
SOURCES = KERNELS / "csrc"
EXPORTS = SOURCES / "exports.map"

_ARCHITECTURE = re.compile(r"_sm(\d+)")
_VARIANT = re.compile(r"d(\d+)_(bf16|fp16)")


@dataclass(frozen=True)
class Unit:
    """One call of the compiler. name: also that of its object file. architectures: those it is compiled for."""

    name: str
    source: Path
    architectures: tuple[str, ...]


def list_units(settings: Settings, architectures: tuple[str, ...], sources: Path = SOURCES) -> list[Unit]:
    """Returns the units to compile for these architectures, of the variants that `settings` asks for."""
    units = []
    for source in sorted(sources.rglob("*.cu")):
        name = ".".join(source.relative_to(sources).with_suffix("").parts)
        variant = _VARIANT.fullmatch(source.stem)
        if variant and not (variant[1] in settings.head_dims and variant[2] in settings.dtypes):
            continue
        only = _ARCHITECTURE.findall(name)
        wanted = tuple(name for name in architectures if not only or name in only)
        if wanted:
            units.append(Unit(name, source, wanted))
    return units
