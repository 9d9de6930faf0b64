"""`flash-dmattn info`: versions, what the CUDA library was built for, and which backends run here."""

import argparse
import json
import os
import platform
import shlex
import shutil
from importlib import metadata
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

import torch

import flash_dmattn
from flash_dmattn.backends.cuda import library
from flash_dmattn_hf.cli import enable


def add_parser(commands, shared: argparse.ArgumentParser) -> None:
    """Adds the command to the command line."""
    parser = commands.add_parser(
        "info", parents=[shared], help="versions and backends", description="Says which backends run here, and why not."
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Prints the table, or JSON."""
    facts = {"versions": versions(), "devices": devices(), "hook": enable.is_enabled()}
    facts["cuda_library"] = cuda_library()
    facts["engines"] = flash_dmattn.explain_backends()
    if args.json:
        print(json.dumps(facts, indent=2))
        return
    for name, version in facts["versions"].items():
        print(f"{name:14} {version or 'not installed'}")
    for device in facts["devices"]:
        print(f"{'device':14} {device}")
    print(f"{'start-up hook':14} {enable.describe()}")
    library_facts = facts["cuda_library"]
    print(f"{'CUDA library':14} {library_facts['state']}")
    if library_facts["built"] and library_facts["missing"]:
        print(f"{'':14} not for {name_gpus(library_facts['missing'])}")
    if library_facts["command"]:
        print(f"{'':14} this builds {'the rest' if library_facts['built'] else 'it'}:")
        print(f"{'':14} {library_facts['command']}")
    print()
    for name, reason in facts["engines"].items():
        print(f"{name:14} {'available' if reason is None else f'unavailable: {reason}'}")


def versions() -> dict[str, str | None]:
    """Returns package -> version, None if it is not installed."""
    names = ("flash-dmattn-hf", "torch", "transformers", "accelerate", "safetensors", "triton", "gguf", "peft")
    return {"python": platform.python_version(), **{name: _version(name) for name in names}}


def cuda_library() -> dict[str, Any]:
    """Returns what the CUDA library is, in words, for which architectures it was built, and for which not.

    With them comes the command that builds all: None where nothing is missing, where the library is there but cannot be
    used, or where the command cannot work.
    """
    reason = library.why_unavailable()
    if reason and (os.environ.get(library.DISABLING_VARIABLE) == "1" or library.PATH.is_file()):
        return {"state": f"unavailable: {reason}", "built": [], "missing": [], "command": None}
    built = [] if reason else list(library.architectures())
    missing = [name for name in library.GPUS if name not in built]
    install = _install_again() if missing and _has_compiler() else None
    command = install and f"FLASH_DMATTN_CUDA_ARCHS=all {install}"
    state = f"built for {name_gpus(built)}" if built else "not built"
    return {"state": state, "built": built, "missing": missing, "command": command}


def name_gpus(architectures: list[str]) -> str:
    """Returns architectures with the GPUs that they are for, in words."""
    return ", ".join(f"sm_{name} ({library.GPUS[name]})" for name in architectures)


def _has_compiler() -> bool:
    """Whether nvcc is where the build looks for it."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    return shutil.which("nvcc", path=os.path.join(home, "bin") if home else None) is not None


def _install_again() -> str | None:
    """Returns the command that builds this package once more, from where it was installed; None if it never was."""
    try:
        record = metadata.distribution("flash-dmattn-hf").read_text("direct_url.json")
    except metadata.PackageNotFoundError:
        return None
    source = json.loads(record) if record else {}
    place = source.get("url")
    if place is None:
        place = "--no-binary flash-dmattn-hf flash-dmattn-hf"
    elif version_control := source.get("vcs_info"):
        folder = f"#subdirectory={source['subdirectory']}" if "subdirectory" in source else ""
        place = shlex.quote(f"{version_control['vcs']}+{place}@{version_control['commit_id']}{folder}")
    else:
        place = shlex.quote(url2pathname(urlsplit(place).path) if place.startswith("file://") else place)
    option = "--editable " if source.get("dir_info", {}).get("editable") else ""
    return f"python -m pip install --force-reinstall --no-deps {option}{place}"


def devices() -> list[str]:
    """Returns the GPUs torch sees, then the CPU and its threads."""
    gpus = []
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            gpus.append(
                f"cuda:{index} {properties.name}, compute capability {properties.major}.{properties.minor}, "
                f"{properties.total_memory / 2**30:.0f} GiB"
            )
    return [*gpus, f"cpu {platform.machine()}, {torch.get_num_threads()} threads"]


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
