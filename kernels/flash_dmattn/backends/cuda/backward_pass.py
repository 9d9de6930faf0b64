"""The backwards in CUDA: one call of the package's own library, which lists the keys and computes all gradients."""

import functools
import struct

import torch

from flash_dmattn.backends.cuda import sm80_backward, sm90_backward
from flash_dmattn.backends.cuda.library import address
from flash_dmattn.backends.cuda.lists import ListsParameters
from flash_dmattn.backends.cuda.parameters import BACKWARD_TENSORS, BackwardPlanParameters
from flash_dmattn.backends.cuda.plans import MOST_PLANS, PassShape, Plan
from flash_dmattn.backends.cuda.target import find_target
from flash_dmattn.calls import AttentionCall

_UNLISTED_EPOCH_TILES = 32  # few enough to give every block work

pack_tensors = struct.Struct(f"{len(BACKWARD_TENSORS)}Q").pack
"""Packs the addresses that BACKWARD_TENSORS names, 0 for none."""


def reject_backward(call: AttentionCall) -> str | None:
    """Returns why the backward for the GPU's architecture does not serve a call that the forward serves, or None."""
    is_for_sm90a = find_target(call.query.device).is_for_sm90a
    return (sm90_backward if is_for_sm90a else sm80_backward).reject_backward(call)


def as_rows(tensor: torch.Tensor) -> torch.Tensor:
    """Returns out or its gradient as the kernels read them: contiguous, aligned to 16 bytes."""
    tensor = tensor.contiguous()
    return tensor.clone() if tensor.data_ptr() % 16 else tensor


@functools.lru_cache(MOST_PLANS)
def plan_backward(shape: PassShape) -> Plan:
    """Returns the plan of all backwards of that shape; its selection is None, because intervals are given."""
    is_for_sm90a = shape.target.is_for_sm90a
    own = sm90_backward if is_for_sm90a else sm80_backward
    tiles = shape.tile_fields(own.tile_rows(shape), _UNLISTED_EPOCH_TILES)
    kernel = own.Parameters(**shape.attention_fields(tiles), **own.own_fields(shape, tiles))
    parameters = BackwardPlanParameters(
        lists=ListsParameters(**shape.list_fields(tiles)),
        **{"sm90" if is_for_sm90a else "sm80": kernel},
        is_for_sm90a=is_for_sm90a,
        **shape.flags(),
    )
    return Plan("backward", parameters, shape.device)


def run_backward(
    call: AttentionCall, out: torch.Tensor, stats: torch.Tensor, dout: torch.Tensor, dlse: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Returns dquery, dkey, dvalue in their dtypes and dimportance float32, or None without importance.

    Allocates float32 sums of the size of key and value and, for a number of epochs, of query; beside the key lists 8
    (sm80) or 20 bytes per query row.
    """
    shape = PassShape.of(call)
    plan = plan_backward(shape)
    gradients = [
        None if tensor is None else torch.empty_like(tensor, memory_format=torch.contiguous_format)
        for tensor in (call.query, call.key, call.value, call.importance)
    ]
    scratch = torch.empty(plan.scratch_bytes, dtype=torch.uint8, device=out.device)
    birth, death = call.intervals() if shape.sizes is not None else (None, None)
    inputs = (call.query, call.key, call.value, call.importance, birth, death, call.query_start, call.query_positions)
    out, dout, dlse = as_rows(out), as_rows(dout), dlse.contiguous()
    plan.run(pack_tensors(*map(address, (*inputs, out, dout, dlse, stats, *gradients, scratch))))
    return tuple(gradients)
