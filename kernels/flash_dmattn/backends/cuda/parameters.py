"""What the attention kernels are launched with: the structs of kernels/csrc/params.h, and their shared fields.

params.h explains the fields. Its structs share most of them, but each has its own order.
"""

import ctypes

import torch

from flash_dmattn.backends.cuda.library import pointer
from flash_dmattn.backends.key_lists import KeyLists
from flash_dmattn.calls import AttentionCall


def _pointers(*names: str) -> tuple:
    return tuple((name, ctypes.c_void_p) for name in names)


def _integers(*names: str) -> tuple:
    return tuple((name, ctypes.c_int32) for name in names)


_INPUTS = _pointers("query", "key", "value")
_SUMS_AND_GRADIENTS = _pointers("dquery_sums", "dkey_sums", "dvalue_sums", "dimportance", "dquery", "dkey", "dvalue")
_LISTS = (
    *_pointers("birth", "death", "query_start", "query_positions"),
    *_pointers("entries", "biases", "sections", "stretches"),
    *((name, ctypes.c_int64 * 3) for name in ("query_strides", "key_strides", "value_strides")),
    ("softmax_scale", ctypes.c_float),
    ("softcap", ctypes.c_float),
    *_integers("batch", "seqlen_q", "seqlen_k", "num_interval_heads", "interval_heads_per_kv_head", "group_size"),
    *_integers("num_epochs", "epoch_size"),
)
_TILES = _integers("tiles_per_epoch", "tile_size", "capacity")
_TYPE = _integers("head_dim", "is_bfloat16")


class ForwardParameters(ctypes.Structure):
    """Mirrors flash_dmattn_forward_params."""

    _fields_ = (
        *_INPUTS,
        *_pointers("out", "lse", "stats"),
        *_LISTS,
        *_TILES,
        *_TYPE,
        *_integers("is_for_sm90a", "shared_bytes"),
    )


class Sm90BackwardParameters(ctypes.Structure):
    """Mirrors flash_dmattn_sm90_backward_params."""

    _fields_ = (
        *_INPUTS,
        *_pointers("out", "dout", "dlse", "stats", "row_facts", "counters"),
        *_SUMS_AND_GRADIENTS,
        *_LISTS,
        *_TILES,
        *_integers("num_slots"),
        *_TYPE,
        *_integers("deterministic"),
    )


class Sm80BackwardParameters(ctypes.Structure):
    """Mirrors flash_dmattn_sm80_backward_params."""

    _fields_ = (
        *_INPUTS,
        *_pointers("out", "dout", "dlse", "stats", "deltas"),
        *_SUMS_AND_GRADIENTS,
        *_LISTS,
        *_integers("epochs_at_once"),
        *_TILES,
        *_TYPE,
        *_integers("shared_bytes"),
    )


def addresses(**tensors: torch.Tensor | None) -> dict[str, int | None]:
    """Returns the fields that hold these tensors, which must live until the launch."""
    return {name: pointer(tensor) for name, tensor in tensors.items()}


def call_fields(call: AttentionCall, lists: KeyLists, query_start: torch.Tensor | None) -> dict[str, object]:
    """Returns the fields that all three structs share.

    query_start: (B,) int32, the row of each sequence's first query, or None where the kernel does not read it. All
    tensors, this one among them, must live until the launch.
    """
    batch, seqlen_q, num_heads, head_dim = call.query.shape
    return {
        **addresses(query=call.query, key=call.key, value=call.value, birth=call.birth, death=call.death),
        **addresses(query_start=query_start, query_positions=call.query_positions),
        **addresses(entries=lists.entries, biases=lists.biases, sections=lists.sections, stretches=lists.stretches),
        "query_strides": _strides(call.query),
        "key_strides": _strides(call.key),
        "value_strides": _strides(call.value),
        "softmax_scale": call.softmax_scale,
        "softcap": call.softcap,
        "batch": batch,
        "seqlen_q": seqlen_q,
        "seqlen_k": call.key.shape[1],
        "num_interval_heads": call.num_interval_heads,
        "interval_heads_per_kv_head": call.num_interval_heads // call.key.shape[2],
        "group_size": num_heads // call.num_interval_heads,
        "num_epochs": lists.num_epochs,
        "epoch_size": lists.epoch_size,
        "tiles_per_epoch": lists.tiles_per_epoch,
        "tile_size": lists.tile_size,
        "capacity": lists.capacity,
        "head_dim": head_dim,
        "is_bfloat16": call.query.dtype == torch.bfloat16,
    }


def _strides(tensor: torch.Tensor) -> ctypes.Array:
    return (ctypes.c_int64 * 3)(*tensor.stride()[:3])
