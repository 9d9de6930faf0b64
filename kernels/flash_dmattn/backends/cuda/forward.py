"""The forward in CUDA: one launch of the package's own library over the key lists of a call."""

import ctypes

import torch

from flash_dmattn.backends.cuda.library import launch, load, pointer
from flash_dmattn.backends.triton.lists import KeyLists
from flash_dmattn.call import AttentionCall


class _Parameters(ctypes.Structure):
    """Mirrors flash_dmattn_forward_params of kernels/csrc/forward.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("query", "key", "value", "out", "lse", "importance", "birth", "death")),
        *((name, ctypes.c_void_p) for name in ("query_start", "query_positions", "entries", "sections", "stretches")),
        ("query_strides", ctypes.c_int64 * 3),
        ("key_strides", ctypes.c_int64 * 3),
        ("value_strides", ctypes.c_int64 * 3),
        ("softmax_scale", ctypes.c_float),
        ("softcap", ctypes.c_float),
        ("batch", ctypes.c_int32),
        ("seqlen_q", ctypes.c_int32),
        ("seqlen_k", ctypes.c_int32),
        ("num_interval_heads", ctypes.c_int32),
        ("interval_heads_per_kv_head", ctypes.c_int32),
        ("group_size", ctypes.c_int32),
        ("num_epochs", ctypes.c_int32),
        ("epoch_size", ctypes.c_int32),
        ("tiles_per_epoch", ctypes.c_int32),
        ("tile_size", ctypes.c_int32),
        ("capacity", ctypes.c_int32),
        ("head_dim", ctypes.c_int32),
        ("is_bfloat16", ctypes.c_int32),
    )


def tile_size(call: AttentionCall) -> int:
    """Returns the query tokens of a tile, whose rows are tokens x group heads."""
    rows = load().flash_dmattn_forward_tile_rows(call.query.shape[-1])
    return rows // (call.query.shape[2] // call.num_interval_heads)


def run_forward(call: AttentionCall, lists: KeyLists) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns out (B, Sq, H, D) in query's dtype and lse (B, H, Sq) float32.

    lists: those of the call, for tiles of `tile_size(call)` query tokens. Raises RuntimeError when the launch fails.
    """
    batch, seqlen_q, num_heads, head_dim = call.query.shape
    out = torch.empty_like(call.query, memory_format=torch.contiguous_format)
    lse = torch.empty(batch, num_heads, seqlen_q, dtype=torch.float32, device=out.device)
    parameters = _Parameters(
        call.query.data_ptr(),
        call.key.data_ptr(),
        call.value.data_ptr(),
        out.data_ptr(),
        lse.data_ptr(),
        pointer(call.importance),
        call.birth.data_ptr(),
        call.death.data_ptr(),
        pointer(call.query_start),
        pointer(call.query_positions),
        lists.entries.data_ptr(),
        lists.sections.data_ptr(),
        lists.stretches.data_ptr(),
        _strides(call.query),
        _strides(call.key),
        _strides(call.value),
        call.softmax_scale,
        call.softcap,
        batch,
        seqlen_q,
        call.key.shape[1],
        call.num_interval_heads,
        call.num_interval_heads // call.key.shape[2],
        num_heads // call.num_interval_heads,
        lists.num_epochs,
        lists.epoch_size,
        lists.tiles_per_epoch,
        lists.tile_size,
        lists.capacity,
        head_dim,
        call.query.dtype == torch.bfloat16,
    )
    launch("flash_dmattn_forward", parameters, out.device)
    return out, lse


def _strides(tensor: torch.Tensor):
    return (ctypes.c_int64 * 3)(*tensor.stride()[:3])
