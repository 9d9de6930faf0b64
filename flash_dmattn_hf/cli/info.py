"""`flash-dmattn info`: versions, and which backends run here."""

import argparse
import json
import platform
from importlib import metadata

import torch

import flash_dmattn
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
    facts["engines"] = flash_dmattn.explain_backends()
    if args.json:
        print(json.dumps(facts, indent=2))
        return
    for name, version in facts["versions"].items():
        print(f"{name:14} {version or 'not installed'}")
    for device in facts["devices"]:
        print(f"{'device':14} {device}")
    print(f"{'start-up hook':14} {'enabled' if facts['hook'] else 'not enabled'}")
    print()
    for name, reason in facts["engines"].items():
        print(f"{name:14} {'available' if reason is None else f'unavailable: {reason}'}")


def versions() -> dict[str, str | None]:
    """Returns package -> version, None if it is not installed."""
    names = ("flash-dmattn-hf", "torch", "transformers", "accelerate", "safetensors", "triton", "gguf", "peft")
    return {"python": platform.python_version(), **{name: _version(name) for name in names}}


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
