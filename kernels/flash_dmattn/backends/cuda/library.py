"""The compiled CUDA library: loaded from the package's own folder, checked, and called with an error check.

A kernel is a plain C function that takes a pointer to its parameters and a stream and returns a CUDA error code. The
library links no torch and no Python, so one file serves all versions of both.
"""

import ctypes
import functools
import os
from collections.abc import Callable
from pathlib import Path

import torch

from flash_dmattn.backends.device import why_no_gpu

ABI_VERSION = 7
"""The version of functions and parameter structs that this package calls; FLASH_DMATTN_ABI_VERSION in csrc/api.h."""

DISABLING_VARIABLE = "FLASH_DMATTN_DISABLE_CUDA"
"""1 makes the library unavailable, so that everything is served as where it is not installed."""

PATH = Path(__file__).resolve().parents[2] / "libflash_dmattn_cuda.so"


GPUS = {"80": "A100, RTX 30, RTX 40", "90": "H100, H200", "100": "B200", "120": "RTX 50"}
"""The architectures that the library can be built for, and GPUs on which each of them runs."""


_PARAMETERS, _TENSORS, _STREAM = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p
_SIGNATURES = {
    "flash_dmattn_select_workspace": ((_PARAMETERS,), ctypes.c_int64),
    "flash_dmattn_select": ((_PARAMETERS, _STREAM), ctypes.c_int),
    "flash_dmattn_lists_workspace": ((_PARAMETERS,), ctypes.c_int64),
    "flash_dmattn_lists": ((_PARAMETERS, _STREAM), ctypes.c_int),
    "flash_dmattn_forward_scratch": ((_PARAMETERS,), ctypes.c_int64),
    "flash_dmattn_forward_pass": ((_PARAMETERS, _TENSORS, _STREAM), ctypes.c_int),
    "flash_dmattn_backward_scratch": ((_PARAMETERS,), ctypes.c_int64),
    "flash_dmattn_backward_pass": ((_PARAMETERS, _TENSORS, _STREAM), ctypes.c_int),
}


class LibraryUnavailable(RuntimeError):
    """The library is missing or of another version; the text says what to do."""


@functools.cache
def load() -> ctypes.CDLL:
    """Returns the library. Raises `LibraryUnavailable` when it is not there or not of this package's version."""
    return _open(PATH)


def why_unavailable() -> str | None:
    """Returns why the library cannot be used, or None. Raises ValueError for a switch that is neither 0 nor 1."""
    switch = os.environ.get(DISABLING_VARIABLE, "")
    if switch not in ("", "0", "1"):
        raise ValueError(f"the environment variable {DISABLING_VARIABLE} must be 0 or 1, got {switch!r}")
    return f"{DISABLING_VARIABLE}=1 turns it off" if switch == "1" else _why_not_loaded()


@functools.cache
def _why_not_loaded() -> str | None:
    try:
        load()
    except LibraryUnavailable as error:
        return str(error)
    return None


def why_not_on(device: torch.device) -> str | None:
    """Returns why the library's kernels cannot run on `device`, or None."""
    if device.type != "cuda":
        return f"tensors are on {device}, not on a CUDA GPU"
    return why_unavailable() or why_no_gpu() or _why_not_built_for(device)


@functools.cache
def _why_not_built_for(device: torch.device) -> str | None:
    if torch.version.hip is not None:  # it calls its GPUs CUDA devices, and some have capability 9.0
        return "torch was built for ROCm"
    major, minor = torch.cuda.get_device_capability(device)
    built = [int(name) for name in architectures()]
    # Code for sm_90a runs on 9.0 alone, other code on its own and later minor versions.
    if major * 10 in built and (major != 9 or minor == 0):
        return None
    return (
        f"the CUDA library was built for sm_{', sm_'.join(map(str, built))}, the GPU is of compute capability "
        f"{major}.{minor}; FLASH_DMATTN_CUDA_ARCHS chooses what is built"
    )


@functools.cache
def architectures() -> tuple[str, ...]:
    """Returns the architectures that the library was compiled for, such as ("80", "90")."""
    ask = load().flash_dmattn_architectures
    ask.restype = ctypes.c_char_p
    return tuple(ask().decode().split())


@functools.cache
def head_dims() -> tuple[int, ...]:
    """Returns the head dims that the library was compiled for, such as (64, 128)."""
    ask = load().flash_dmattn_head_dims
    ask.restype = ctypes.c_char_p
    return tuple(map(int, ask().decode().split()))


@functools.cache
def function(name: str) -> Callable[..., int]:
    """Returns a function of the library that takes addresses, the last one of a stream where it launches anything."""
    found = getattr(load(), name)
    found.argtypes, found.restype = _SIGNATURES[name]
    return found


def launch(name: str, parameters: ctypes.Structure, device: torch.device, *tensors: bytes) -> None:
    """Calls `name` with `parameters`, and packed addresses if it takes some, on the current stream of `device`.

    Raises RuntimeError for a CUDA error.
    """
    if torch.cuda.current_device() != device.index:
        with torch.cuda.device(device):
            return launch(name, parameters, device, *tensors)
    stream = torch._C._cuda_getCurrentRawStream(device.index)  # without the object around it
    error = function(name)(ctypes.byref(parameters), *tensors, stream)
    if error != 0:
        explain = load().flash_dmattn_error_string
        explain.restype = ctypes.c_char_p
        raise RuntimeError(f"{name} failed: {explain(error).decode()}")


def pointer(tensor: torch.Tensor | None) -> int | None:
    """Returns the address of a tensor for a field of type c_void_p, or None."""
    return None if tensor is None else tensor.data_ptr()


def address(tensor: torch.Tensor | None) -> int:
    """Returns the address of a tensor to be packed, 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


def _open(path: Path) -> ctypes.CDLL:
    if not path.is_file():
        raise LibraryUnavailable(
            f"the CUDA library {path.name} is not in {path.parent}: flash_dmattn was installed without it, because "
            "nvcc or ninja was missing or FLASH_DMATTN_SKIP_CUDA_BUILD was set; install it again where CUDA_HOME or "
            "PATH leads to a CUDA toolkit"
        )
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise LibraryUnavailable(f"the CUDA library {path} cannot be loaded: {error}") from error
    version = library.flash_dmattn_abi_version() if hasattr(library, "flash_dmattn_abi_version") else None
    if version != ABI_VERSION:
        raise LibraryUnavailable(
            f"the CUDA library {path} has ABI version {version}, this package needs {ABI_VERSION}: "
            "install flash_dmattn again"
        )
    return library
