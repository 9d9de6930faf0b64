"""Parameters of which a process may hold a part or nothing: FSDP's DTensors, and those of DeepSpeed's ZeRO-3."""

import torch
from torch.distributed.tensor import DTensor


def is_divided(parameter: torch.Tensor) -> bool:
    """True for a DTensor, and for a parameter that ZeRO-3 has divided and not gathered at this moment."""
    return isinstance(parameter, DTensor) or tuple(parameter.shape) != whole_shape(parameter)


def whole_shape(parameter: torch.Tensor) -> tuple[int, ...]:
    """Returns the shape that a parameter has when no process holds only a part of it."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def gather(parameter: torch.Tensor) -> torch.Tensor:
    """Returns all values of a parameter, without a gradient. All processes that share it have to call this."""
    if isinstance(parameter, DTensor):
        return parameter.detach().full_tensor()
    if not is_divided(parameter):
        return parameter.detach()
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter]):
        return parameter.detach().clone()
