"""The forward in CUDA: one call of the package's own library, which selects if asked to, lists the keys and attends."""

import functools
import struct

import torch

from flash_dmattn.backends.cuda import library
from flash_dmattn.backends.cuda.library import address
from flash_dmattn.backends.cuda.lists import ListsParameters
from flash_dmattn.backends.cuda.parameters import FORWARD_TENSORS, ForwardParameters, ForwardPlanParameters
from flash_dmattn.backends.cuda.plans import MOST_PLANS, PassShape, Plan
from flash_dmattn.backends.cuda.selection import SelectParameters, size_fields
from flash_dmattn.backends.cuda.target import find_target
from flash_dmattn.calls import AttentionCall

pack_tensors = struct.Struct(f"{len(FORWARD_TENSORS)}Q").pack
"""Packs the addresses that FORWARD_TENSORS names, 0 for none."""


def tile_rows(head_dim: int, query: torch.Tensor) -> int:
    """Returns the rows of a query tile, tokens x group heads, or 0 when the library has no such kernel.

    head_dim: the kernel's. query: of the call, which tells dtype and device.
    """
    return _tile_rows(head_dim, query.dtype == torch.bfloat16, find_target(query.device).is_for_sm90a)


@functools.lru_cache(MOST_PLANS)
def plan_forward(shape: PassShape) -> Plan:
    """Returns the plan of all forwards of that shape."""
    tiles = shape.tile_fields(_tile_rows(shape.head_dim, shape.is_bfloat16, shape.target.is_for_sm90a), None)
    select = SelectParameters()
    if shape.selection is not None:
        axis = shape.batch, shape.num_interval_heads, shape.seqlen_k
        strides = shape.list_fields(tiles)["importance_strides"]
        select = SelectParameters(**size_fields(axis, strides, torch.float32, *shape.selection, num_docs=1))
    parameters = ForwardPlanParameters(
        select=select,
        lists=ListsParameters(**shape.list_fields(tiles)),
        forward=ForwardParameters(
            **shape.attention_fields(tiles),
            is_for_sm90a=shape.target.is_for_sm90a,
            shared_bytes=shape.target.shared_bytes,
        ),
        selects=shape.selection is not None,
        **shape.flags(),
    )
    return Plan("forward", parameters, shape.device)


def run_forward(call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns out, lse and stats, as the operator does."""
    batch, seqlen_q, num_heads, _ = call.query.shape
    shape = PassShape.of(call)
    plan = plan_forward(shape)
    out = torch.empty_like(call.query, memory_format=torch.contiguous_format)
    lse = torch.empty(batch, num_heads, seqlen_q, dtype=torch.float32, device=out.device)
    stats = torch.empty(2, *lse.shape, dtype=torch.float32, device=out.device)
    scratch = torch.empty(plan.scratch_bytes, dtype=torch.uint8, device=out.device)
    birth, death = call.intervals() if shape.sizes is not None else (None, None)
    inputs = (call.query, call.key, call.value, call.importance, birth, death, call.query_start, call.query_positions)
    plan.run(pack_tensors(*map(address, inputs), *map(address, (out, lse, stats, scratch))))
    return out, lse, stats


def _tile_rows(head_dim: int, is_bfloat16: bool, is_for_sm90a: bool) -> int:
    return library.load().flash_dmattn_forward_tile_rows(head_dim, is_bfloat16, is_for_sm90a)
