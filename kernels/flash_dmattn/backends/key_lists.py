"""Key lists: which keys a run of queries has to look at, in O(N (1 + w / E)) integers. Two backends build them.

Queries are cut into epochs of E rows. The list of an epoch holds first the keys that are alive at its first row, the
earliest to die first, then those born later in it, the earliest born first. Of such a list a query tile needs one
contiguous stretch: what has died before it lies at the front, what is not born yet at the back. In the middle stand
the keys that the whole epoch sees, which need no comparison.
"""

import math
from dataclasses import dataclass

import torch

from flash_dmattn.calls import AttentionCall
from flash_dmattn.visibility import NEVER

LARGEST_BIAS = 2.3e38
"""Importances above it are no larger as a bias: times log2(e) it is still a float32."""


@dataclass(frozen=True)
class KeyLists:
    """Lists per (batch and interval head, epoch); num_lists is R = B * Hi.

    entries: (R, epochs, capacity) int32, key numbers; None when every key is visible from its own row on: then one
        epoch holds all queries and the list is the keys in order, without sections and stretches.
    biases: (R, epochs, capacity) float32, the entries' importance times log2(e), or None without importance.
    sections: (R, epochs, 3) int32: the first entry that needs no comparison because the whole epoch sees it, the number
        of entries alive at the epoch's start, the number of all entries.
    stretches: (R, epochs, tiles, 2) int32, the first entry that a query tile needs and the one after its last.
    """

    entries: torch.Tensor | None
    biases: torch.Tensor | None
    sections: torch.Tensor | None
    stretches: torch.Tensor | None
    num_lists: int
    num_epochs: int
    capacity: int
    epoch_size: int
    tile_size: int

    @property
    def tiles_per_epoch(self) -> int:
        return -(-self.epoch_size // self.tile_size)


def is_listed(call: AttentionCall) -> bool:
    """Whether keys have to be listed: not where every key is visible from its own row on."""
    if call.weighs_pairs:
        return True  # only kernels over lists serve these
    return call.birth is not None or call.query_positions is not None


def whole_sequence(call: AttentionCall, tile_size: int) -> KeyLists:
    """Returns the lists of a call without intervals, which need only biases."""
    batch, seqlen_q = call.query.shape[:2]
    biases = None if call.importance is None else scale_importance(call.importance)
    num_lists, epoch_size = batch * call.num_interval_heads, _next_power_of_2(seqlen_q)
    return KeyLists(None, biases, None, None, num_lists, 1, call.key.shape[1], epoch_size, tile_size)


def scale_importance(importance: torch.Tensor) -> torch.Tensor:
    """Returns what importances add to exponents of 2: times log2(e), NaN as -inf."""
    biases = importance.nan_to_num(nan=-torch.inf, posinf=LARGEST_BIAS, neginf=-torch.inf)
    return biases.clamp_(max=LARGEST_BIAS).mul_(math.log2(math.e))


def choose_epoch_size(seqlen_q: int, max_visible: int) -> int:
    """Returns E, a power of two near w / 4: short enough to look at few dead keys, long enough to store few lists."""
    return min(max(128, min(2048, _next_power_of_2(max_visible) // 4)), _next_power_of_2(seqlen_q))


def allocate_key_lists(call: AttentionCall, capacity: int, epoch_size: int, tile_size: int) -> KeyLists:
    """Returns lists of a call's intervals, without contents."""
    batch, seqlen_q = call.query.shape[:2]
    num_lists = batch * call.num_interval_heads
    num_epochs, tiles = -(-seqlen_q // epoch_size), -(-epoch_size // tile_size)

    def empty(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.empty(num_lists, num_epochs, *shape, dtype=dtype, device=call.query.device)

    biases = None if call.importance is None else empty(capacity, dtype=torch.float32)
    return KeyLists(
        empty(capacity), biases, empty(3), empty(tiles, 2), num_lists, num_epochs, capacity, epoch_size, tile_size
    )


def count_visible(birth: torch.Tensor, death: torch.Tensor) -> int:
    """Returns the largest number of keys that are alive at once, at least 1, read back from the device.

    birth, death: (R, Sk) int32; keys with birth >= death do not count.
    """
    births, deaths = _sorted_bounds(birth, death)
    born = torch.arange(1, births.shape[-1] + 1, device=births.device)
    died = torch.searchsorted(deaths, births, right=True)
    alive = (born - died).masked_fill(births == NEVER, 0)
    return max(1, int(alive.max())) if alive.numel() else 1


def choose_capacity(
    call: AttentionCall, birth: torch.Tensor | None, death: torch.Tensor | None, epoch_size: int
) -> int:
    """Returns how many entries the longest list needs at most; without `call.max_visible` read back from the device.

    birth, death: (R, Sk) int32, not looked at, and None at will, where `call.max_visible` is given.
    """
    seqlen_q, seqlen_k = call.query.shape[1], call.key.shape[1]
    if not call.is_ordered or seqlen_k == 0:  # rows in no order tell nothing about the keys of an epoch
        return seqlen_k
    if call.max_visible is not None:
        return min(seqlen_k, call.max_visible + epoch_size)
    batch, num_lists = call.query.shape[0], birth.shape[0]
    births, deaths = _sorted_bounds(birth, death)
    steps = torch.arange(0, seqlen_q, epoch_size, device=birth.device)
    first = (call.first_rows()[:, None] + steps).repeat_interleave(num_lists // batch, dim=0)  # (R, epochs)
    born = torch.searchsorted(births, first + epoch_size)
    died = torch.searchsorted(deaths, first, right=True)
    return max(1, int((born - died).max())) if born.numel() else 1


def _sorted_bounds(birth: torch.Tensor, death: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    counts = birth < death
    return tuple(torch.where(counts, bound, NEVER).long().sort(dim=-1).values for bound in (birth, death))


def _next_power_of_2(number: int) -> int:
    return 1 << max(0, number - 1).bit_length()
