"""What the passes of the CUDA library are launched with: the structs of csrc/params.h and csrc/passes.h, mirrored.

The headers explain the fields. The structs of params.h share most of them, but each has its own order.
"""

import ctypes

from flash_dmattn.backends.cuda.lists import ListsParameters
from flash_dmattn.backends.cuda.selection import SelectParameters


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


class ForwardPlanParameters(ctypes.Structure):
    """Mirrors flash_dmattn_forward_plan."""

    _fields_ = (
        ("select", SelectParameters),
        ("lists", ListsParameters),
        ("forward", ForwardParameters),
        *_integers("selects", "is_listed", "is_ordered", "has_bias"),
    )


class BackwardPlanParameters(ctypes.Structure):
    """Mirrors flash_dmattn_backward_plan."""

    _fields_ = (
        ("lists", ListsParameters),
        ("sm90", Sm90BackwardParameters),
        ("sm80", Sm80BackwardParameters),
        *_integers("is_for_sm90a", "is_listed", "is_ordered", "has_bias"),
    )


FORWARD_TENSORS = (
    *("query", "key", "value", "importance", "birth", "death", "query_start", "query_positions"),
    *("out", "lse", "stats", "scratch"),
)
"""The fields of flash_dmattn_forward_tensors, all of them addresses."""

BACKWARD_TENSORS = (
    *("query", "key", "value", "importance", "birth", "death", "query_start", "query_positions"),
    *("out", "dout", "dlse", "stats", "dquery", "dkey", "dvalue", "dimportance", "scratch"),
)
"""The fields of flash_dmattn_backward_tensors, all of them addresses."""
