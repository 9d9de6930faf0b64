"""`flash-dmattn info`: versions, what the CUDA library was built for, and which backends run here."""

import argparse
import json
import platform
import shlex
from importlib import metadata
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

import torch

import flash_dmattn
from flash_dmattn.backends.cuda import library
from flash_dmattn_hf.cli.enable import is_enabled


def add_parser(commands, shared: argparse.ArgumentParser) -> None:
    """Adds the command to the command line."""
    parser = commands.add_parser(
        "info", parents=[shared], help="versions and backends", description="Says which backends run here, and why not."
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Prints the table, or JSON."""
    facts = {"versions": versions(), "devices": devices(), "hook": is_enabled()}
    facts["cuda_library"] = cuda_library()
    facts["engines"] = flash_dmattn.explain_backends()
    if args.json:
        print(json.dumps(facts, indent=2))
        return
    for name, version in facts["versions"].items():
        print(f"{name:14} {version or 'not installed'}")
    for device in facts["devices"]:
        print(f"{'device':14} {device}")
    print(f"{'start-up hook':14} {'enabled' if facts['hook'] else 'not enabled'}")
    built, missing, command = facts["cuda_library"].values()
    print(f"{'CUDA library':14} {'built for ' + name_gpus(built) if built else 'not built'}")
    if missing:
        print(f"{'':14} not for {name_gpus(missing)}; this builds the rest:\n{'':14} {command}")
    print()
    for name, reason in facts["engines"].items():
        print(f"{name:14} {'available' if reason is None else f'unavailable: {reason}'}")


def versions() -> dict[str, str | None]:
    """Returns package -> version, None if it is not installed."""
    names = ("flash-dmattn-hf", "torch", "transformers", "accelerate", "safetensors", "triton", "gguf", "peft")
    return {"python": platform.python_version(), **{name: _version(name) for name in names}}


def cuda_library() -> dict[str, Any]:
    """Returns for which architectures the CUDA library was built, for which not, and the command that builds all."""
    built = [] if library.why_unavailable() else list(library.architectures())
    missing = [name for name in library.GPUS if name not in built]
    return {"built": built, "missing": missing, "command": f"FLASH_DMATTN_CUDA_ARCHS=all {_install_again()}"}


def name_gpus(architectures: list[str]) -> str:
    """Returns architectures with the GPUs that they are for, in words."""
    return ", ".join(f"sm_{name} ({library.GPUS[name]})" for name in architectures)


def _install_again() -> str:
    """Returns the command that builds this package once more, from where it was installed from."""
    record = metadata.distribution("flash-dmattn-hf").read_text("direct_url.json")
    source = json.loads(record) if record else {}
    place = source.get("url", "--no-binary flash-dmattn-hf flash-dmattn-hf")
    place = shlex.quote(url2pathname(urlsplit(place).path)) if place.startswith("file://") else place
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
