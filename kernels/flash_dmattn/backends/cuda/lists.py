"""Key lists built by the CUDA library in two launches."""

import ctypes
import math
from typing import NamedTuple

import torch

from flash_dmattn.backends.cuda import library
from flash_dmattn.backends.device import reject_lanes
from flash_dmattn.backends.key_lists import (
    KeyLists,
    allocate_key_lists,
    choose_capacity,
    choose_epoch_size,
    count_visible,
    is_listed,
    whole_sequence,
)
from flash_dmattn.calls import AttentionCall

_MAX_EPOCH = 2048
_POINTERS = (
    "birth",
    "death",
    "importance",
    "query_start",
    "query_positions",
    "entries",
    "biases",
    "sections",
    "stretches",
    "workspace",
)
_SIZES = (
    "batch",
    "num_heads",
    "seqlen_q",
    "seqlen_k",
    "num_epochs",
    "epoch_size",
    "capacity",
    "tiles_per_epoch",
    "tile_size",
)


class ListsParameters(ctypes.Structure):
    """flash_dmattn_lists_params of csrc/lists.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in _POINTERS),
        ("workspace_bytes", ctypes.c_int64),
        ("importance_strides", ctypes.c_int64 * 3),
        *((name, ctypes.c_int32) for name in _SIZES),
    ]


def reject(call: AttentionCall) -> str | None:
    """Returns why the library does not build lists for a call, or None."""
    return reject_lanes(call.query.shape[0] * call.num_interval_heads) or library.why_not_on(call.query.device)


class ListSizes(NamedTuple):
    """epoch_size: in query rows. capacity: entries of a list."""

    epoch_size: int
    capacity: int


def choose_sizes(call: AttentionCall) -> ListSizes:
    """Returns the sizes of a listed call. Waits for the device where `call.max_visible` is None, to count the keys."""
    seqlen_q, seqlen_k = call.query.shape[1], call.key.shape[1]
    birth = death = None
    max_visible = call.max_visible
    if max_visible is None:
        birth, death = (bound.flatten(0, 1) for bound in call.intervals())
        max_visible = count_visible(birth, death)
    # Long epochs for few visible keys of a long sequence keep the table of (chunk, epoch) small.
    shortest = 1 << max(0, math.ceil(math.log2(max(1, min(seqlen_q, seqlen_k))) / 2) - 1)
    epoch_size = min(max(choose_epoch_size(seqlen_q, max_visible), shortest), _MAX_EPOCH)
    return ListSizes(epoch_size, choose_capacity(call, birth, death, epoch_size))


def build_key_lists(call: AttentionCall, tile_size: int) -> KeyLists:
    """Builds the lists for query tiles of `tile_size` rows, for tensors on a GPU that the library serves.

    Allocates up to 12 bytes a key beside them. Waits for the device where `choose_sizes` does.
    """
    if not is_listed(call):
        return whole_sequence(call, tile_size)
    epoch_size, capacity = choose_sizes(call)
    birth, death = call.intervals()
    lists = allocate_key_lists(call, capacity, epoch_size, tile_size)
    query_start = call.first_rows() if call.is_ordered else None
    parameters = ListsParameters(
        birth=library.pointer(birth),
        death=library.pointer(death),
        importance=library.pointer(call.importance),
        query_start=library.pointer(query_start),
        query_positions=library.pointer(call.query_positions),
        entries=library.pointer(lists.entries),
        biases=library.pointer(lists.biases),
        sections=library.pointer(lists.sections),
        stretches=library.pointer(lists.stretches),
        importance_strides=(0, 0, 0) if call.importance is None else call.importance.stride(),
        batch=call.query.shape[0],
        num_heads=call.num_interval_heads,
        seqlen_q=call.query.shape[1],
        seqlen_k=call.key.shape[1],
        num_epochs=lists.num_epochs,
        epoch_size=epoch_size,
        capacity=capacity,
        tiles_per_epoch=lists.tiles_per_epoch,
        tile_size=tile_size,
    )
    parameters.workspace_bytes = library.function("flash_dmattn_lists_workspace")(ctypes.byref(parameters))
    workspace = torch.empty(parameters.workspace_bytes, dtype=torch.uint8, device=birth.device)
    parameters.workspace = library.pointer(workspace)
    library.launch("flash_dmattn_lists", parameters, birth.device)
    return lists
