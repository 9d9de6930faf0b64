"""The forward in CUDA: one launch of the package's own library over the key lists of a call."""

import ctypes

import torch

from flash_dmattn.backends.cuda.library import launch, load, pointer
from flash_dmattn.backends.cuda.target import find_target
from flash_dmattn.backends.key_lists import KeyLists, scale_importance
from flash_dmattn.calls import AttentionCall


class _Parameters(ctypes.Structure):
    """Mirrors flash_dmattn_forward_params of kernels/csrc/forward.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("query", "key", "value", "out", "lse", "stats", "birth", "death")),
        *((name, ctypes.c_void_p) for name in ("query_start", "query_positions")),
        *((name, ctypes.c_void_p) for name in ("entries", "biases", "sections", "stretches")),
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
        ("is_for_sm90a", ctypes.c_int32),
        ("shared_bytes", ctypes.c_int32),
    )


def tile_rows(call: AttentionCall) -> int:
    """Returns the rows of a query tile, tokens x group heads, or 0 when the library has no kernel for the call."""
    target = find_target(call.query.device)
    is_bfloat16 = call.query.dtype == torch.bfloat16
    return load().flash_dmattn_forward_tile_rows(call.query.shape[-1], is_bfloat16, target.is_for_sm90a)


def tile_size(call: AttentionCall) -> int:
    """Returns the query tokens of a tile."""
    return tile_rows(call) // (call.query.shape[2] // call.num_interval_heads)


def run_forward(call: AttentionCall, lists: KeyLists | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns out, lse and stats, as the operator does.

    lists: those of the call for tiles of `tile_size(call)`; None where every key is visible from its own row on.
    """
    batch, seqlen_q, num_heads, head_dim = call.query.shape
    out = torch.empty_like(call.query, memory_format=torch.contiguous_format)
    lse = torch.empty(batch, num_heads, seqlen_q, dtype=torch.float32, device=out.device)
    stats = torch.empty(2, *lse.shape, dtype=torch.float32, device=out.device)
    target = find_target(out.device)
    # The kernels for Hopper know the start and scale the importance themselves where there are no lists.
    is_plain = lists is None and target.is_for_sm90a
    query_start = call.first_rows() if call.is_ordered and not is_plain else call.query_start
    biases = None if lists is None else lists.biases
    if lists is None:
        # The only epoch is as long as the sequence, so that no tile of it is empty.
        lists = KeyLists(None, None, None, None, 0, 1, call.key.shape[1], seqlen_q, tile_size(call))
        biases = call.importance
        if not is_plain and biases is not None:
            biases = scale_importance(biases)
    parameters = _Parameters(
        query=call.query.data_ptr(),
        key=call.key.data_ptr(),
        value=call.value.data_ptr(),
        out=out.data_ptr(),
        lse=lse.data_ptr(),
        stats=stats.data_ptr(),
        birth=pointer(call.birth),
        death=pointer(call.death),
        query_start=pointer(query_start),
        query_positions=pointer(call.query_positions),
        entries=pointer(lists.entries),
        biases=pointer(biases),
        sections=pointer(lists.sections),
        stretches=pointer(lists.stretches),
        query_strides=_strides(call.query),
        key_strides=_strides(call.key),
        value_strides=_strides(call.value),
        softmax_scale=call.softmax_scale,
        softcap=call.softcap,
        batch=batch,
        seqlen_q=seqlen_q,
        seqlen_k=call.key.shape[1],
        num_interval_heads=call.num_interval_heads,
        interval_heads_per_kv_head=call.num_interval_heads // call.key.shape[2],
        group_size=num_heads // call.num_interval_heads,
        num_epochs=lists.num_epochs,
        epoch_size=lists.epoch_size,
        tiles_per_epoch=lists.tiles_per_epoch,
        tile_size=lists.tile_size,
        capacity=lists.capacity,
        head_dim=head_dim,
        is_bfloat16=call.query.dtype == torch.bfloat16,
        is_for_sm90a=target.is_for_sm90a,
        shared_bytes=target.shared_bytes,
    )
    launch("flash_dmattn_forward", parameters, out.device)
    return out, lse, stats


def _strides(tensor: torch.Tensor):
    return (ctypes.c_int64 * 3)(*tensor.stride()[:3])
