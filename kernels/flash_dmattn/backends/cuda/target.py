"""Which of the library's kernels a GPU gets: those for its architecture, or for one that it is asked to stand for."""

import functools
import os
from dataclasses import dataclass

import torch

ARCHITECTURE_VARIABLE = "FLASH_DMATTN_CUDA_ARCH"
"""Names the architecture whose kernels and block shapes are used instead of the GPU's own, when set."""

_SHARED_KB = {"80": 163, "86": 99, "89": 99, "90": 227, "100": 227, "120": 99}
_HOPPER = (9, 0)


@dataclass(frozen=True)
class Target:
    """is_for_sm90a: the sm90 kernels, otherwise the sm80 kernels, which run on every architecture from sm_80 on.
    shared_bytes: of shared memory that a block may have."""

    is_for_sm90a: bool
    shared_bytes: int


def find_target(device: torch.device) -> Target:
    """Returns what a CUDA device runs. Raises ValueError when the environment variable names no known architecture."""
    return _find_target(device, os.environ.get(ARCHITECTURE_VARIABLE, ""))


def reject(device: torch.device) -> str | None:
    """Returns why a CUDA device cannot run what it is asked to, or None."""
    if find_target(device).is_for_sm90a and torch.cuda.get_device_capability(device) != _HOPPER:
        return f"{ARCHITECTURE_VARIABLE} asks for the kernels for sm_90a, which run on compute capability 9.0 alone"
    return None


@functools.cache
def _find_target(device: torch.device, architecture: str) -> Target:
    shared_bytes = torch.cuda.get_device_properties(device).shared_memory_per_block_optin
    if not architecture:
        return Target(torch.cuda.get_device_capability(device) == _HOPPER, shared_bytes)
    if architecture not in _SHARED_KB:
        raise ValueError(
            f"the environment variable {ARCHITECTURE_VARIABLE} must be one of {', '.join(_SHARED_KB)}, "
            f"got {architecture!r}"
        )
    return Target(architecture == "90", min(shared_bytes, _SHARED_KB[architecture] * 1024))
