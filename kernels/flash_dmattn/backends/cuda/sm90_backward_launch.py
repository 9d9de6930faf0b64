"""The sm90 backward in CUDA: one call of the package's own library over the key lists of a call.

A work item is a tile of an epoch's keys with the run of query tiles that see some of it. dkey, dvalue and dimportance
stay in registers over an item, dquery is added to float32 sums in memory, of which a few epochs have one at a time: see
csrc/sm90/backward/kernel.cuh.
"""

import torch

from flash_dmattn.backends.cuda.gradients import allocate_gradients, build_backward_lists
from flash_dmattn.backends.cuda.library import launch, load
from flash_dmattn.backends.cuda.parameters import Sm90BackwardParameters, addresses, call_fields
from flash_dmattn.calls import AttentionCall

_SMALLEST_KEY_TILE = 64
_LONGEST_QUERY_TILE = 2**29
_LISTS_AT_ONCE = 8  # of the deterministic order


def reject_backward(call: AttentionCall) -> str | None:
    """Returns why this backward does not serve a call that the forward serves, or None."""
    if call.deterministic and not call.is_ordered:
        return "rows in no order have no fixed order of sums"
    if call.query.numel() == 0 or call.key.shape[1] == 0:
        return "there are no queries or no keys"
    _, token_stride, head_stride, _ = call.query.stride()
    num_heads = call.query.shape[2]
    tile_size = tile_rows(call) // (num_heads // call.num_interval_heads)
    if max(tile_size * token_stride, num_heads * head_stride) > _LONGEST_QUERY_TILE:
        return f"rows of query that belong together are more than {_LONGEST_QUERY_TILE} numbers apart"
    return None


def tile_rows(call: AttentionCall) -> int:
    """Returns the rows of a query tile, tokens x group heads."""
    return load().flash_dmattn_sm90_backward_tile_rows(call.query.shape[-1])


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
    seqlen_q, num_heads, head_dim = call.query.shape[1:]
    device = call.query.device
    rows = tile_rows(call)
    lists = build_backward_lists(call, rows)
    gradients = allocate_gradients(call)
    all_lists, tiles = lists.num_lists * lists.num_epochs, lists.tiles_per_epoch
    num_slots = count_slots(all_lists, lists.capacity, torch.cuda.get_device_properties(device).multi_processor_count)
    dquery_sums = torch.zeros(num_slots, tiles, rows, head_dim, dtype=torch.float32, device=device)
    num_counters = 1 + all_lists * (1 + 2 * tiles if call.deterministic else 1)
    counters = torch.zeros(num_counters, dtype=torch.int32, device=device)
    group_size = num_heads // call.num_interval_heads
    row_facts = torch.empty(lists.num_lists, seqlen_q, group_size, 4, dtype=torch.float32, device=device)
    dout, dlse = dout.contiguous(), dlse.contiguous()
    query_start = call.first_rows() if call.is_ordered else None
    parameters = Sm90BackwardParameters(
        **call_fields(call, lists, query_start),
        **addresses(out=out, dout=dout, dlse=dlse, stats=stats, row_facts=row_facts, counters=counters),
        **addresses(dquery_sums=dquery_sums, **vars(gradients)),
        num_slots=num_slots,
        deterministic=call.deterministic,
    )
    launch("flash_dmattn_sm90_backward", parameters, device)
    return gradients.results()
