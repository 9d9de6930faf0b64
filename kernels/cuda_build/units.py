"""What is compiled: every source below kernels/csrc is one translation unit, and an instance.cu one for each variant.

A large kernel has an instance.cu in its folder. It is compiled once for each head dim and dtype, with HEAD_DIM and
DTYPE defined: sm90/forward/instance.cu becomes sm90_forward_d128_bf16 and others. The kernels in the folder sm80 run on
every architecture from sm_80 on. Those in sm90 use instructions that only sm_90a has.
"""

from dataclasses import dataclass
from pathlib import Path

from cuda_build.settings import Settings

KERNELS = Path(__file__).resolve().parent.parent
SOURCES = KERNELS / "csrc"
EXPORTS = SOURCES / "exports.map"

_ONLY_ARCHITECTURE = {"sm90": "90"}  # of the sources in a folder of that name
_ELEMENTS = {"bf16": "__nv_bfloat16", "fp16": "__half"}


@dataclass(frozen=True)
class Unit:
    """One call of the compiler.

    name: also that of its object file. architectures: those it is compiled for. defines: "NAME=VALUE" for the
    preprocessor.
    """

    name: str
    source: Path
    architectures: tuple[str, ...]
    defines: tuple[str, ...] = ()


def list_units(settings: Settings, architectures: tuple[str, ...], sources: Path = SOURCES) -> list[Unit]:
    """Returns the units to compile for these architectures, of the variants that `settings` asks for."""
    units = []
    for source in sorted(sources.rglob("*.cu")):
        *folders, stem = source.relative_to(sources).with_suffix("").parts
        only = _ONLY_ARCHITECTURE.get(folders[0]) if folders else None
        wanted = tuple(name for name in architectures if only in (None, name))
        if not wanted:
            continue
        if stem != "instance":
            defines = _facts_of_library(settings, architectures) if stem == "library" else ()
            units.append(Unit("_".join((*folders, stem)), source, wanted, defines))
            continue
        for head_dim in settings.head_dims:
            for dtype in settings.dtypes:
                name = "_".join((*folders, f"d{head_dim}", dtype))
                defines = (f"HEAD_DIM={head_dim}", f"DTYPE={_ELEMENTS[dtype]}")
                units.append(Unit(name, source, wanted, defines))
    return units


def _facts_of_library(settings: Settings, architectures: tuple[str, ...]) -> tuple[str, ...]:
    """What the library can be asked about itself, as strings of C."""
    return (
        f'FLASH_DMATTN_ARCHITECTURES="{" ".join(architectures)}"',
        f'FLASH_DMATTN_HEAD_DIMS="{" ".join(settings.head_dims)}"',
    )
