"""The sm90 backward in CUDA: which calls it serves, and how its work is cut.

A work item is a tile of an epoch's keys with the run of query tiles that see some of it. dkey, dvalue and dimportance
stay in registers over an item, dquery is added to float32 sums in memory, of which a few epochs have one at a time: see
csrc/sm90/backward/kernel.cuh.
"""

import torch

from flash_dmattn.backends.cuda import library
from flash_dmattn.backends.cuda.head_dims import is_filled_up, kernel_dim
from flash_dmattn.backends.cuda.parameters import Sm90BackwardParameters
from flash_dmattn.backends.cuda.plans import PassShape
from flash_dmattn.calls import AttentionCall

_SMALLEST_KEY_TILE = 64
_LONGEST_QUERY_TILE = 2**29
_LISTS_AT_ONCE = 8  # of the deterministic order

Parameters = Sm90BackwardParameters


def reject_backward(call: AttentionCall) -> str | None:
    """Returns why this backward does not serve a call that the forward serves, or None."""
    if call.deterministic and not call.is_ordered:
        return "rows in no order have no fixed order of sums"
    if call.query.numel() == 0 or call.key.shape[1] == 0:
        return "there are no queries or no keys"
    num_heads, head_dim = call.query.shape[2], kernel_dim(call.query.shape[3])
    _, token_stride, head_stride, _ = call.query.stride()
    if is_filled_up(call):
        token_stride, head_stride = num_heads * head_dim, head_dim
    tile_size = _tile_rows(head_dim) // (num_heads // call.num_interval_heads)
    if max(tile_size * token_stride, num_heads * head_stride) > _LONGEST_QUERY_TILE:
        return f"rows of query that belong together are more than {_LONGEST_QUERY_TILE} numbers apart"
    return None


def tile_rows(shape: PassShape) -> int:
    """Returns the rows of a query tile, tokens x group heads."""
    return _tile_rows(shape.head_dim)


def count_slots(num_lists: int, capacity: int, num_processors: int) -> int:
    """Returns how many epochs have sums of dquery at a time: twice those that the blocks are at work on."""
    items_of_list = -(-capacity // (2 * _SMALLEST_KEY_TILE))
    return min(num_lists, max(2 + -(-2 * num_processors // items_of_list), 3 * _LISTS_AT_ONCE))


def own_fields(shape: PassShape, tiles: dict[str, int]) -> dict[str, int]:
    """Returns the fields of `Sm90BackwardParameters` that are no addresses and that no other kernel has.

    Sums of dquery are float32, for a number of epochs that depends on the GPU.
    """
    processors = torch.cuda.get_device_properties(shape.device).multi_processor_count
    num_lists = shape.num_lists * tiles["num_epochs"]
    return {
        "num_slots": count_slots(num_lists, tiles["capacity"], processors),
        "deterministic": shape.deterministic,
    }


def _tile_rows(head_dim: int) -> int:
    return library.load().flash_dmattn_sm90_backward_tile_rows(head_dim)
