"""The backward in CUDA: one call of the package's own library over the key lists of a call.

A work item is a tile of an epoch's keys with the run of query tiles that see some of it. dkey, dvalue and dimportance
stay in registers over an item, dquery is added to float32 sums in memory, of which a few epochs have one at a time: see
csrc/backward_sm90/kernel.cuh.
"""

import ctypes

import torch

from flash_dmattn.backends.cuda.library import launch, load, pointer
from flash_dmattn.backends.cuda.lists import build_key_lists
from flash_dmattn.backends.key_lists import KeyLists
from flash_dmattn.calls import AttentionCall

_UNLISTED_EPOCH_TILES = 32
_SMALLEST_KEY_TILE = 64
_LONGEST_QUERY_TILE = 2**29
_LISTS_AT_ONCE = 8  # of the deterministic order


class _Parameters(ctypes.Structure):
    """Mirrors flash_dmattn_backward_params of kernels/csrc/backward.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("query", "key", "value", "out", "dout", "dlse", "stats")),
        *((name, ctypes.c_void_p) for name in ("row_facts", "counters")),
        *((name, ctypes.c_void_p) for name in ("dquery_sums", "dkey_sums", "dvalue_sums", "dimportance")),
        *((name, ctypes.c_void_p) for name in ("dquery", "dkey", "dvalue", "birth", "death")),
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
        ("num_slots", ctypes.c_int32),
        ("head_dim", ctypes.c_int32),
        ("is_bfloat16", ctypes.c_int32),
        ("deterministic", ctypes.c_int32),
    )


def reject_backward(call: AttentionCall) -> str | None:
    """Returns why this backward does not serve a call that the forward serves, or None."""
    if call.deterministic and not call.is_ordered:
        return "rows in no order have no fixed order of sums"
    if call.query.numel() == 0 or call.key.shape[1] == 0:
        return "there are no queries or no keys"
    _, token_stride, head_stride, _ = call.query.stride()
    if max(tile_size(call) * token_stride, call.query.shape[2] * head_stride) > _LONGEST_QUERY_TILE:
        return f"rows of query that belong together are more than {_LONGEST_QUERY_TILE} numbers apart"
    return None


def tile_size(call: AttentionCall) -> int:
    """Returns the query tokens of a tile, whose rows are tokens x group heads."""
    rows = load().flash_dmattn_backward_tile_rows(call.query.shape[-1])
    return rows // (call.query.shape[2] // call.num_interval_heads)


def unlisted_epoch_size(seqlen_q: int, tokens_of_tile: int) -> int:
    """Returns the tokens of an epoch where keys are not listed: whole tiles, few enough to give every block work."""
    return min(_UNLISTED_EPOCH_TILES, -(-seqlen_q // tokens_of_tile)) * tokens_of_tile


def count_slots(num_lists: int, capacity: int, num_processors: int) -> int:
    """Returns how many epochs have sums of dquery at a time: twice those that the blocks are at work on."""
    items_of_list = -(-capacity // (2 * _SMALLEST_KEY_TILE))
    return min(num_lists, max(2 + -(-2 * num_processors // items_of_list), 3 * _LISTS_AT_ONCE))


def run_backward(
    call: AttentionCall, out: torch.Tensor, stats: torch.Tensor, dout: torch.Tensor, dlse: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Returns dquery, dkey, dvalue in their dtypes and dimportance float32, or None without importance.

    Allocates float32 sums of the size of key and value and, for a number of epochs that depends on the GPU, of query;
    beside the key lists 16 bytes per query row.
    """
    lists = build_key_lists(call, tile_size(call))
    return run_listed_backward(call, lists, out, stats, dout, dlse)


def run_listed_backward(
    call: AttentionCall,
    lists: KeyLists,
    out: torch.Tensor,
    stats: torch.Tensor,
    dout: torch.Tensor,
    dlse: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """As `run_backward`; lists: those of the call for tiles of `tile_size(call)`."""
    batch, seqlen_q, num_heads, head_dim = call.query.shape
    device = call.query.device
    group_size = num_heads // call.num_interval_heads
    epoch_size, num_epochs = lists.epoch_size, lists.num_epochs
    if lists.entries is None:
        epoch_size = unlisted_epoch_size(seqlen_q, lists.tile_size)
        num_epochs = -(-seqlen_q // epoch_size)
    tiles_per_epoch = -(-epoch_size // lists.tile_size)
    tile_rows = load().flash_dmattn_backward_tile_rows(head_dim)

    def zeros(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=torch.float32, device=device)

    def like(tensor: torch.Tensor) -> torch.Tensor:
        return torch.empty_like(tensor, memory_format=torch.contiguous_format)

    dquery, dkey, dvalue = like(call.query), like(call.key), like(call.value)
    dimportance = None if call.importance is None else zeros(*call.importance.shape)
    all_lists = lists.num_lists * num_epochs
    num_slots = count_slots(all_lists, lists.capacity, torch.cuda.get_device_properties(device).multi_processor_count)
    dquery_sums = zeros(num_slots, tiles_per_epoch, tile_rows, head_dim)
    dkey_sums, dvalue_sums = zeros(2, *call.key.shape)
    num_counters = 1 + all_lists * (1 + 2 * tiles_per_epoch if call.deterministic else 1)
    counters = torch.zeros(num_counters, dtype=torch.int32, device=device)
    row_facts = torch.empty(lists.num_lists, seqlen_q, group_size, 4, dtype=torch.float32, device=device)
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
        row_facts=row_facts.data_ptr(),
        counters=counters.data_ptr(),
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
        group_size=group_size,
        num_epochs=num_epochs,
        epoch_size=epoch_size,
        tiles_per_epoch=tiles_per_epoch,
        tile_size=lists.tile_size,
        capacity=lists.capacity,
        num_slots=num_slots,
        head_dim=head_dim,
        is_bfloat16=call.query.dtype == torch.bfloat16,
        deterministic=call.deterministic,
    )
    launch("flash_dmattn_backward", parameters, device)
    return dquery, dkey, dvalue, dimportance


def _strides(tensor: torch.Tensor):
    return (ctypes.c_int64 * 3)(*tensor.stride()[:3])
