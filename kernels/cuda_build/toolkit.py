"""The tools of a build: nvcc with the architectures it knows, and ninja."""

import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from cuda_build.settings import Settings

_OLDEST_RELEASE = 12  # of CUDA: the first with sm_90a


class MissingTool(RuntimeError):
    """A tool that the build needs is not on this machine; the text says which and where it was looked for."""


@dataclass(frozen=True)
class Toolkit:
    """nvcc: the compiler. ninja: the build tool. supported: the architectures, such as "90", that nvcc knows."""

    nvcc: Path
    ninja: Path
    supported: frozenset[str]


def find_toolkit(environment: Mapping[str, str] = os.environ) -> Toolkit:
    """Looks for nvcc in CUDA_HOME, CUDA_PATH and PATH, and for ninja. Raises `MissingTool`."""
    nvcc = _find_nvcc(environment)
    release = re.search(r"release (\d+)\.", _ask(nvcc, "--version"))
    if release is None or int(release[1]) < _OLDEST_RELEASE:
        raise MissingTool(f"{nvcc} is older than CUDA {_OLDEST_RELEASE}.0, which the kernels need")
    listed = _ask(nvcc, "--list-gpu-code")
    supported = frozenset(line.strip().removeprefix("sm_") for line in listed.splitlines() if line.strip())
    return Toolkit(nvcc, _find_ninja(environment), supported)


def keep_supported(settings: Settings, toolkit: Toolkit) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Splits the wanted architectures in those that nvcc knows and the others."""
    kept = tuple(name for name in settings.architectures if name in toolkit.supported)
    return kept, tuple(name for name in settings.architectures if name not in toolkit.supported)


def _ask(nvcc: Path, option: str) -> str:
    asked = subprocess.run([nvcc, option], capture_output=True, text=True)
    if asked.returncode != 0:
        raise MissingTool(f"{nvcc} {option} failed: {(asked.stderr or asked.stdout).strip()}")
    return asked.stdout


def _find_nvcc(environment: Mapping[str, str]) -> Path:
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if environment.get(variable):
            nvcc = Path(environment[variable]) / "bin" / "nvcc"
            if not nvcc.is_file():
                raise MissingTool(f"{variable} is {environment[variable]}, which has no bin/nvcc")
            return nvcc
    found = shutil.which("nvcc", path=environment.get("PATH", ""))
    if found is None:
        raise MissingTool("nvcc was not found: neither CUDA_HOME nor CUDA_PATH is set and PATH has none")
    return Path(found)


def _find_ninja(environment: Mapping[str, str]) -> Path:
    folders = environment.get("PATH", "")
    try:
        import ninja  # the package of that name brings its own program
    except ImportError:
        pass
    else:
        folders = os.pathsep.join([ninja.BIN_DIR, folders])
    found = shutil.which("ninja", path=folders)
    if found is None:
        raise MissingTool("ninja was not found: pip install ninja")
    return Path(found)
