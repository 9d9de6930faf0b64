"""What every kernel asks of a GPU and of tensors on it, in words."""

import functools

import torch

MAX_LANES = 65535
"""Programs of a launch in its second and third dimension: one for every batch row and head."""


@functools.cache
def why_no_gpu() -> str | None:
    """Returns why no CUDA GPU can be used here, or None."""
    if torch.cuda.is_available():
        return None
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    return "no CUDA GPU is visible to torch"


def reject_lanes(lanes: int) -> str | None:
    """Returns why so many pairs of a batch row and a head do not fit into one launch, or None."""
    return f"{lanes} (batch, head) pairs are above {MAX_LANES}" if lanes > MAX_LANES else None


def reject_layout(call) -> str | None:
    """Returns why a kernel cannot read query, key or value of a call, or None."""
    for name, tensor in (("query", call.query), ("key", call.key), ("value", call.value)):
        if tensor.stride(-1) != 1:
            return f"{name} is not contiguous in the head dim"
    return None


def strides(call) -> tuple[int, ...]:
    """Returns the strides of query, key and value of a call, each over batch, rows and heads."""
    return *call.query.stride()[:3], *call.key.stride()[:3], *call.value.stride()[:3]
