"""Key lists: which keys a run of queries has to look at, built on the device in O(N (1 + w / E)) integers.

Queries are cut into epochs of E rows. The list of an epoch holds first the keys that are alive at its first row, the
earliest to die first, then those born later in it, the earliest born first. Of such a list a query tile needs one
contiguous stretch: what has died before it lies at the front, what is not born yet at the back. In the middle stand
the keys that the whole epoch sees, which need no comparison.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from flash_dmattn.backends.triton.tiles import LOG2E, query_rows
from flash_dmattn.call import AttentionCall

_CHUNK = 1024
_LARGEST_BIAS = 2.3e38  # times log2(e) it is still a float32


@dataclass(frozen=True)
class KeyLists:
    """Lists per (batch and interval head, epoch); R = B * Hi.

    entries: (R, epochs, capacity) int32, key numbers; None when every key is visible from its own row on: then one
        epoch holds all queries and the list is the keys in order, without sections and stretches.
    biases: (R, epochs, capacity) float32, the entries' importance times log2(e), or None without importance.
    sections: (R, epochs, 3) int32: the first entry seen by the whole epoch, the number of entries alive at its start,
        the number of all entries.
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
        return triton.cdiv(self.epoch_size, self.tile_size)


def choose_epoch_size(seqlen_q: int, max_visible: int) -> int:
    """Returns E, a power of two near w / 4: short enough to look at few dead keys, long enough to store few lists."""
    return min(max(128, min(2048, triton.next_power_of_2(max_visible) // 4)), triton.next_power_of_2(seqlen_q))


def is_listed(call: AttentionCall) -> bool:
    """Whether keys have to be gathered: not where every key is visible from its own row on."""
    return call.birth is not None or call.query_positions is not None


def build_key_lists(call: AttentionCall, tile_size: int) -> KeyLists:
    """Builds the lists for query tiles of `tile_size` rows.

    Waits for the device only when intervals come without `call.max_visible`, to count the keys.
    """
    if not is_listed(call):
        return _whole_sequence(call, tile_size)
    batch, seqlen_q = call.query.shape[:2]
    seqlen_k = call.key.shape[1]
    heads = call.num_interval_heads
    device = call.query.device
    num_lists = batch * heads
    birth_in, death_in = call.intervals()
    importance = call.importance

    birth = torch.empty(num_lists, seqlen_k, dtype=torch.int32, device=device)
    death = torch.empty_like(birth)
    out_of_order = torch.zeros(num_lists, dtype=torch.int32, device=device)
    _mark_listed[(triton.cdiv(seqlen_k, _CHUNK), num_lists)](
        birth_in,
        death_in,
        birth_in if importance is None else importance,
        birth,
        death,
        out_of_order,
        seqlen_k,
        HAS_BIAS=importance is not None,
        CHUNK=_CHUNK,
    )
    death_sorted, by_death = death.sort(dim=-1)

    max_visible = call.max_visible
    if max_visible is None:
        max_visible = max(1, _count_visible(birth, death))
    epoch_size = choose_epoch_size(seqlen_q, max_visible)
    num_epochs = triton.cdiv(seqlen_q, epoch_size)
    # Rows in no order tell nothing about how many keys an epoch spans.
    capacity = seqlen_k if call.query_start is None else min(seqlen_k, max_visible + epoch_size)
    tiles = triton.cdiv(epoch_size, tile_size)
    entries = torch.empty(num_lists, num_epochs, capacity, dtype=torch.int32, device=device)
    biases = None if importance is None else torch.empty_like(entries, dtype=torch.float32)
    sections = torch.empty(num_lists, num_epochs, 3, dtype=torch.int32, device=device)
    stretches = torch.empty(num_lists, num_epochs, tiles, 2, dtype=torch.int32, device=device)
    rows = (
        death if call.query_start is None else call.query_start,
        death if call.query_positions is None else call.query_positions,
    )
    sizes = (heads, seqlen_q, seqlen_k, num_epochs, capacity)
    constants = {
        "EPOCH": epoch_size,
        "HAS_POSITIONS": call.query_positions is not None,
    }
    _fill_lists[(num_epochs, num_lists)](
        by_death,
        death_sorted,
        birth,
        death,
        out_of_order,
        *rows,
        birth if importance is None else importance,
        entries,
        entries if biases is None else biases,
        sections,
        *sizes,
        LARGEST_BIAS=_LARGEST_BIAS,
        HAS_BIAS=importance is not None,
        CHUNK=_CHUNK,
        **constants,
    )
    _find_stretches[(num_epochs, num_lists)](
        entries,
        sections,
        birth,
        death,
        *rows,
        stretches,
        *sizes,
        tiles,
        TILE=tile_size,
        TILES=triton.next_power_of_2(tiles),
        LANES=triton.next_power_of_2(tile_size),
        HAS_START=call.query_start is not None,
        CHUNK=128,
        **constants,
    )
    return KeyLists(entries, biases, sections, stretches, num_lists, num_epochs, capacity, epoch_size, tile_size)


def _whole_sequence(call: AttentionCall, tile_size: int) -> KeyLists:
    batch, seqlen_q = call.query.shape[:2]
    seqlen_k = call.key.shape[1]
    biases = None
    if call.importance is not None:
        biases = call.importance.clamp(max=_LARGEST_BIAS).mul_(LOG2E.value)
    num_lists = batch * call.num_interval_heads
    epoch_size = triton.next_power_of_2(seqlen_q)
    return KeyLists(None, biases, None, None, num_lists, 1, seqlen_k, epoch_size, tile_size)


def _count_visible(birth: torch.Tensor, death: torch.Tensor) -> int:
    """Returns the largest number of keys that are alive at once, read back from the device."""
    births = birth.sort(dim=-1).values
    deaths = torch.where(death < 0, torch.iinfo(torch.int32).max, death).sort(dim=-1).values
    seqlen_k = births.shape[-1]
    born = torch.arange(1, seqlen_k + 1, device=births.device)
    died = torch.searchsorted(deaths, births, right=True)
    alive = (born - died).masked_fill(births == torch.iinfo(torch.int32).max, 0)
    return int(alive.max())


@triton.jit
def _mark_listed(
    birth_in_ptr,  # (R, Sk)
    death_in_ptr,  # (R, Sk)
    importance_ptr,  # (R, Sk)
    birth_ptr,  # (R, Sk), int32 maximum for keys that weigh nothing
    death_ptr,  # (R, Sk), -1 for them
    out_of_order_ptr,  # (R,), set where a listed key's birth is not its own number
    seqlen_k,
    HAS_BIAS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    row = tl.program_id(1).to(tl.int64)
    key = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    place = row * seqlen_k + key
    birth = tl.load(birth_in_ptr + place, mask=key < seqlen_k, other=0)
    death = tl.load(death_in_ptr + place, mask=key < seqlen_k, other=0)
    is_listed = birth < death
    if HAS_BIAS:
        importance = tl.load(importance_ptr + place, mask=key < seqlen_k, other=0.0)
        is_listed = is_listed & (importance > float("-inf"))
    tl.store(birth_ptr + place, tl.where(is_listed, birth, 2147483647), mask=key < seqlen_k)
    tl.store(death_ptr + place, tl.where(is_listed, death, -1), mask=key < seqlen_k)
    if tl.max((is_listed & (birth != key)).to(tl.int32), axis=0) > 0:
        tl.store(out_of_order_ptr + row, 1)


@triton.jit
def _epoch_rows(
    start_ptr,
    positions_ptr,
    batch,
    epoch,
    seqlen_q,
    EPOCH: tl.constexpr,
    HAS_POSITIONS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Returns the lowest and the highest query row of an epoch; int32 maximum and -1 when it has none."""
    begin = epoch * EPOCH
    end = tl.minimum(begin + EPOCH, seqlen_q)
    if HAS_POSITIONS:
        first = 2147483647
        last = -1
        for offset in range(begin, end, CHUNK):
            query = offset + tl.arange(0, CHUNK)
            row = tl.load(positions_ptr + batch.to(tl.int64) * seqlen_q + query, mask=query < end, other=-1)
            first = tl.minimum(first, tl.min(tl.where(row < 0, 2147483647, row), axis=0))
            last = tl.maximum(last, tl.max(row, axis=0))
    else:
        start = tl.load(start_ptr + batch)
        first = start + begin
        last = start + end - 1
    return first, last


@triton.jit
def _append(
    entries_ptr, biases_ptr, importance_ptr, count, key, is_wanted, capacity, LARGEST_BIAS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):  # fmt: skip
    place = count + tl.cumsum(is_wanted.to(tl.int32), axis=0) - 1
    is_wanted = is_wanted & (place < capacity)
    tl.store(entries_ptr + place, key, mask=is_wanted)
    if HAS_BIAS:
        bias = tl.load(importance_ptr + key, mask=is_wanted, other=0.0)
        tl.store(biases_ptr + place, tl.minimum(bias, LARGEST_BIAS) * LOG2E, mask=is_wanted)
    return count + tl.sum(is_wanted.to(tl.int32), axis=0)


@triton.jit
def _fill_lists(
    by_death_ptr,  # (R, Sk) int64, keys by death
    death_sorted_ptr,  # (R, Sk)
    birth_ptr,  # (R, Sk)
    death_ptr,  # (R, Sk)
    out_of_order_ptr,  # (R,)
    start_ptr,  # (B,)
    positions_ptr,  # (B, Sq)
    importance_ptr,  # (R, Sk)
    entries_ptr,  # (R, epochs, capacity)
    biases_ptr,  # (R, epochs, capacity)
    sections_ptr,  # (R, epochs, 3)
    heads,
    seqlen_q,
    seqlen_k,
    num_epochs,
    capacity,
    LARGEST_BIAS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EPOCH: tl.constexpr,
    HAS_POSITIONS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    epoch = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    first, last = _epoch_rows(start_ptr, positions_ptr, head // heads, epoch, seqlen_q, EPOCH, HAS_POSITIONS, CHUNK)
    entries_ptr += (head * num_epochs + epoch) * capacity
    biases_ptr += (head * num_epochs + epoch) * capacity
    sections_ptr += (head * num_epochs + epoch) * 3
    importance_ptr += head * seqlen_k
    birth_ptr += head * seqlen_k
    death_ptr += head * seqlen_k
    lanes = tl.arange(0, CHUNK)

    # The first place, by death, that outlives the epoch's first row.
    low = 0
    high = seqlen_k
    while low < high:
        middle = (low + high) // 2
        if tl.load(death_sorted_ptr + head * seqlen_k + middle) > first:
            high = middle
        else:
            low = middle + 1

    count = 0
    num_dying = 0
    for offset in range(low, seqlen_k, CHUNK):
        place = offset + lanes
        is_inside = place < seqlen_k
        death = tl.load(death_sorted_ptr + head * seqlen_k + place, mask=is_inside, other=-1)
        key = tl.load(by_death_ptr + head * seqlen_k + place, mask=is_inside, other=0).to(tl.int32)
        birth = tl.load(birth_ptr + key, mask=is_inside, other=2147483647)
        is_alive = (birth <= first) & (death > first)
        num_dying += tl.sum((is_alive & (death <= last)).to(tl.int32), axis=0)
        count = _append(entries_ptr, biases_ptr, importance_ptr, count, key, is_alive, capacity, LARGEST_BIAS, HAS_BIAS)
    num_alive = tl.minimum(count, capacity)

    in_order = tl.load(out_of_order_ptr + head) == 0
    lowest = tl.where(in_order, tl.minimum(first, seqlen_k) + 1, 0)
    highest = tl.where(last < 0, 0, tl.where(in_order, tl.minimum(last + 1, seqlen_k), seqlen_k))
    for offset in range(tl.minimum(lowest, highest), highest, CHUNK):
        key = offset + lanes
        is_inside = key < highest
        birth = tl.load(birth_ptr + key, mask=is_inside, other=-1)
        death = tl.load(death_ptr + key, mask=is_inside, other=-1)
        is_born = is_inside & (birth > first) & (birth <= last) & (birth < death)
        count = _append(entries_ptr, biases_ptr, importance_ptr, count, key, is_born, capacity, LARGEST_BIAS, HAS_BIAS)
    tl.store(sections_ptr, tl.minimum(num_dying, num_alive))
    tl.store(sections_ptr + 1, num_alive)
    tl.store(sections_ptr + 2, tl.minimum(count, capacity))


@triton.jit
def _find_stretches(
    entries_ptr,  # (R, epochs, capacity)
    sections_ptr,  # (R, epochs, 3)
    birth_ptr,  # (R, Sk)
    death_ptr,  # (R, Sk)
    start_ptr,  # (B,)
    positions_ptr,  # (B, Sq)
    stretches_ptr,  # (R, epochs, tiles, 2)
    heads,
    seqlen_q,
    seqlen_k,
    num_epochs,
    capacity,
    tiles,
    EPOCH: tl.constexpr,
    HAS_START: tl.constexpr,
    HAS_POSITIONS: tl.constexpr,
    TILE: tl.constexpr,
    TILES: tl.constexpr,
    LANES: tl.constexpr,
    CHUNK: tl.constexpr,
):
    epoch = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    tile = tl.arange(0, TILES)
    lane = tl.arange(0, LANES)
    token = tile[:, None] * TILE + lane[None, :]
    query = epoch * EPOCH + token
    exists = (lane < TILE)[None, :] & (token < EPOCH) & (query < seqlen_q)
    row = query_rows(start_ptr, positions_ptr, head // heads, query, exists, seqlen_q, HAS_START, HAS_POSITIONS)
    first = tl.min(tl.where(row < 0, 2147483647, row), axis=1)
    last = tl.max(row, axis=1)
    entries_ptr += (head * num_epochs + epoch) * capacity
    sections_ptr += (head * num_epochs + epoch) * 3
    num_dying = tl.load(sections_ptr)
    num_alive = tl.load(sections_ptr + 1)
    total = tl.load(sections_ptr + 2)

    begin = tl.zeros((TILES,), tl.int32)
    for offset in range(0, num_dying, CHUNK):
        place = offset + tl.arange(0, CHUNK)
        key = tl.load(entries_ptr + place, mask=place < num_dying, other=0)
        death = tl.load(death_ptr + head * seqlen_k + key, mask=place < num_dying, other=2147483647)
        begin += tl.sum((death[None, :] <= first[:, None]).to(tl.int32), axis=1)
    end = tl.zeros((TILES,), tl.int32) + num_alive
    for offset in range(num_alive, total, CHUNK):
        place = offset + tl.arange(0, CHUNK)
        key = tl.load(entries_ptr + place, mask=place < total, other=0)
        birth = tl.load(birth_ptr + head * seqlen_k + key, mask=place < total, other=2147483647)
        is_born = birth[None, :] <= last[:, None]
        end = tl.maximum(end, tl.max(tl.where(is_born, place[None, :] + 1, 0), axis=1))
    begin = tl.where(last < 0, 0, begin)
    end = tl.where(last < 0, 0, end)
    stretches_ptr += ((head * num_epochs + epoch) * tiles + tile) * 2
    tl.store(stretches_ptr, begin, mask=tile < tiles)
    tl.store(stretches_ptr + 1, end, mask=tile < tiles)
