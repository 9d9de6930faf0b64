"""The backward in CUDA for all architectures: one call of the package's own library over the key lists of a call.

A block takes a tile of an epoch's keys with the run of query tiles that see some of it. dkey, dvalue and dimportance
stay in registers meanwhile, dquery is added to float32 sums in memory: see csrc/backward_mma/kernel.cuh.
"""

import ctypes

import torch

from flash_dmattn.backends.cuda.backward_launch import unlisted_epoch_size
from flash_dmattn.backends.cuda.library import launch, load, pointer
from flash_dmattn.backends.cuda.lists import build_key_lists
from flash_dmattn.backends.cuda.target import find_target
from flash_dmattn.backends.key_lists import KeyLists
from flash_dmattn.calls import AttentionCall

_ROUNDS = 4
_KEYS_OF_PROCESSOR = 1024  # eight tiles of keys


class _Parameters(ctypes.Structure):
    """Mirrors flash_dmattn_mma_backward_params of kernels/csrc/backward_mma.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("query", "key", "value", "out", "dout", "dlse", "stats", "deltas")),
        *((name, ctypes.c_void_p) for name in ("dquery_sums", "dkey_sums", "dvalue_sums", "dimportance")),
        *((name, ctypes.c_void_p) for name in ("dquery", "dkey", "dvalue")),
        *((name, ctypes.c_void_p) for name in ("birth", "death", "query_start", "query_positions")),
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
        ("epochs_at_once", ctypes.c_int32),
        ("tiles_per_epoch", ctypes.c_int32),
        ("tile_size", ctypes.c_int32),
        ("capacity", ctypes.c_int32),
        ("head_dim", ctypes.c_int32),
        ("is_bfloat16", ctypes.c_int32),
        ("shared_bytes", ctypes.c_int32),
    )


def reject_backward(call: AttentionCall) -> str | None:
    """Returns why this backward does not serve a call that the forward serves, or None."""
    if call.deterministic:
        return "gradients are added up in no fixed order"
    if call.query.numel() == 0 or call.key.shape[1] == 0:
        return "there are no queries or no keys"
    if tile_rows(call) == 0:
        return f"no backward for head dim {call.query.shape[-1]} was built, or the GPU lacks shared memory for it"
    return None


def tile_rows(call: AttentionCall) -> int:
    """Returns the rows of a query tile, tokens x group heads, or 0 when the library has no kernel for the call."""
    shared_bytes = find_target(call.query.device).shared_bytes
    is_bfloat16 = call.query.dtype == torch.bfloat16
    return load().flash_dmattn_mma_backward_tile_rows(call.query.shape[-1], is_bfloat16, shared_bytes)


def count_epochs(num_epochs: int, listed_keys: int, processors: int) -> int:
    """Returns how many epochs of every head have sums of dquery at a time, given the `listed_keys` of one epoch of all
    heads: a quarter of them, unless that leaves a processor too little to do between two waits."""
    enough = -(-_KEYS_OF_PROCESSOR * processors // max(listed_keys, 1))
    return min(num_epochs, max(-(-num_epochs // _ROUNDS), enough))


def run_backward(
    call: AttentionCall, out: torch.Tensor, stats: torch.Tensor, dout: torch.Tensor, dlse: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Returns dquery, dkey, dvalue in their dtypes and dimportance float32, or None without importance.

    Allocates float32 sums of the size of key and value and, for long sequences, of a quarter of query; beside the key
    lists 4 bytes per query row.
    """
    rows = tile_rows(call)
    lists = build_key_lists(call, rows // (call.query.shape[2] // call.num_interval_heads))
    return run_listed_backward(call, lists, rows, out, stats, dout, dlse)


def run_listed_backward(
    call: AttentionCall,
    lists: KeyLists,
    rows: int,
    out: torch.Tensor,
    stats: torch.Tensor,
    dout: torch.Tensor,
    dlse: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """As `run_backward`; lists: those of the call for tiles of `rows` rows."""
    batch, seqlen_q, num_heads, head_dim = call.query.shape
    epoch_size, num_epochs = lists.epoch_size, lists.num_epochs
    if lists.entries is None:
        epoch_size = unlisted_epoch_size(seqlen_q, lists.tile_size)
        num_epochs = -(-seqlen_q // epoch_size)
    tiles_per_epoch = -(-epoch_size // lists.tile_size)

    def zeros(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=torch.float32, device=call.query.device)

    def like(tensor: torch.Tensor) -> torch.Tensor:
        return torch.empty_like(tensor, memory_format=torch.contiguous_format)

    dquery, dkey, dvalue = like(call.query), like(call.key), like(call.value)
    dimportance = None if call.importance is None else zeros(*call.importance.shape)
    processors = torch.cuda.get_device_properties(dquery.device).multi_processor_count
    epochs_at_once = count_epochs(num_epochs, lists.num_lists * lists.capacity, processors)
    sums_shape = (lists.num_lists, epochs_at_once, tiles_per_epoch, rows, head_dim)
    dquery_sums = torch.empty(sums_shape, dtype=torch.float32, device=dquery.device)
    dkey_sums, dvalue_sums = zeros(2, *call.key.shape)
    deltas = torch.empty(batch, num_heads, seqlen_q, dtype=torch.float32, device=dquery.device)
    dout, dlse = dout.contiguous(), dlse.contiguous()
    query_start = call.first_rows() if call.is_ordered else None
    parameters = _Parameters(
        query=call.query.data_ptr(),
        key=call.key.data_ptr(),
        value=call.value.data_ptr(),
        out=out.data_ptr(),
        dout=dout.data_ptr(),
        dlse=dlse.data_ptr(),
        stats=stats.data_ptr(),
        deltas=deltas.data_ptr(),
        dquery_sums=dquery_sums.data_ptr(),
        dkey_sums=dkey_sums.data_ptr(),
        dvalue_sums=dvalue_sums.data_ptr(),
        dimportance=pointer(dimportance),
        dquery=dquery.data_ptr(),
        dkey=dkey.data_ptr(),
        dvalue=dvalue.data_ptr(),
        birth=pointer(call.birth),
        death=pointer(call.death),
        query_start=pointer(query_start),
        query_positions=pointer(call.query_positions),
        entries=pointer(lists.entries),
        biases=pointer(lists.biases),
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
        num_epochs=num_epochs,
        epoch_size=epoch_size,
        epochs_at_once=epochs_at_once,
        tiles_per_epoch=tiles_per_epoch,
        tile_size=lists.tile_size,
        capacity=lists.capacity,
        head_dim=head_dim,
        is_bfloat16=call.query.dtype == torch.bfloat16,
        shared_bytes=find_target(dquery.device).shared_bytes,
    )
    launch("flash_dmattn_mma_backward", parameters, dquery.device)
    return dquery, dkey, dvalue, dimportance


def _strides(tensor: torch.Tensor):
    return (ctypes.c_int64 * 3)(*tensor.stride()[:3])
