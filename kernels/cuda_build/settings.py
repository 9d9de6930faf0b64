"""What to build, from environment variables."""

import os
from collections.abc import Mapping
from dataclasses import dataclass

from cuda_build.gpus import CannotAsk, architecture_for, list_capabilities

ARCHITECTURES = ("80", "90", "100", "120")
HEAD_DIMS = ("64", "96", "128", "192", "256")
DTYPES = ("bf16", "fp16")


@dataclass(frozen=True)
class Settings:
    """Choices of one build.

    architectures: of `ARCHITECTURES`; 90 stands for sm_90a. Empty if no GPU here is one that there are kernels for.
    why: what decided about them, in words. is_asked: whether the environment did, and not the GPUs here.
    head_dims, dtypes: of kernels with such variants, those to compile. An installed library needs all of them.
    skip: build nothing. force: a missing tool is an error.
    max_jobs: compilers at once. nvcc_threads: threads of each, over its architectures.
    """

    architectures: tuple[str, ...] = ARCHITECTURES
    why: str = "all architectures"
    is_asked: bool = True
    head_dims: tuple[str, ...] = HEAD_DIMS
    dtypes: tuple[str, ...] = DTYPES
    skip: bool = False
    force: bool = False
    max_jobs: int = 1
    nvcc_threads: int = 1


def read_settings(environment: Mapping[str, str] = os.environ) -> Settings:
    """Reads the settings; raises ValueError, naming the variable, for a value that makes no sense.

    FLASH_DMATTN_CUDA_ARCHS        architectures, such as "80;90", or "all"; by default those of the GPUs that
                                   nvidia-smi lists, and all where it lists none or fails
    FLASH_DMATTN_HEAD_DIMS         head dims, such as "64;128", to look at some kernels alone; all by default
    FLASH_DMATTN_DTYPES            "bf16", "fp16" or "bf16;fp16" (the default), likewise
    FLASH_DMATTN_SKIP_CUDA_BUILD   1: build no CUDA library
    FLASH_DMATTN_FORCE_BUILD       1: fail when nvcc or ninja is missing
    MAX_JOBS, NVCC_THREADS         compilers at once (all cores by default), threads of each (1 by default)
    """
    skip = _flag(environment, "FLASH_DMATTN_SKIP_CUDA_BUILD")
    architectures, why = _architectures(environment, may_ask=not skip)
    settings = Settings(
        architectures=architectures,
        why=why,
        is_asked=bool(environment.get("FLASH_DMATTN_CUDA_ARCHS", "").strip()),
        head_dims=_choices(environment, "FLASH_DMATTN_HEAD_DIMS", HEAD_DIMS),
        dtypes=_choices(environment, "FLASH_DMATTN_DTYPES", DTYPES),
        skip=skip,
        force=_flag(environment, "FLASH_DMATTN_FORCE_BUILD"),
        max_jobs=_count(environment, "MAX_JOBS", _num_cores()),
        nvcc_threads=_count(environment, "NVCC_THREADS", 1),
    )
    if settings.skip and settings.force:
        raise ValueError("FLASH_DMATTN_SKIP_CUDA_BUILD and FLASH_DMATTN_FORCE_BUILD must not both be set")
    return settings


def _architectures(environment: Mapping[str, str], *, may_ask: bool) -> tuple[tuple[str, ...], str]:
    name = "FLASH_DMATTN_CUDA_ARCHS"
    text = environment.get(name, "").strip()
    if text == "all":
        return ARCHITECTURES, f"as asked by {name}=all"
    if text:
        return _choices(environment, name, ARCHITECTURES), f"as asked by {name}"
    if not may_ask:
        return ARCHITECTURES, "because nothing is built"
    try:
        capabilities = list_capabilities(environment)
    except CannotAsk as error:
        return ARCHITECTURES, f"because nvidia-smi could not be asked: {error}"
    if not capabilities:
        return ARCHITECTURES, "because nvidia-smi lists no GPU here"
    present = {architecture_for(capability) for capability in capabilities}
    kept = tuple(name for name in ARCHITECTURES if name in present)
    return kept, f"for the GPUs here, of compute capability {', '.join(capabilities)}"


def _choices(environment: Mapping[str, str], name: str, known: tuple[str, ...]) -> tuple[str, ...]:
    text = environment.get(name, "")
    wanted = [part.strip() for part in text.replace(",", ";").split(";") if part.strip()]
    if not wanted:
        return known
    if not set(wanted) <= set(known):
        raise ValueError(f'{name} must be a list of {", ".join(known)}, separated by ";", got {text!r}')
    return tuple(choice for choice in known if choice in wanted)


def _flag(environment: Mapping[str, str], name: str) -> bool:
    text = environment.get(name, "")
    if text not in ("", "0", "1"):
        raise ValueError(f"{name} must be 0 or 1, got {text!r}")
    return text == "1"


def _count(environment: Mapping[str, str], name: str, default: int) -> int:
    text = environment.get(name, "")
    if not text:
        return default
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"{name} must be a whole number from 1 on, got {text!r}")
    return int(text)


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
