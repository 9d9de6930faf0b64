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

from flash_dmattn.call import AttentionCall

_CHUNK = 1024


@dataclass(frozen=True)
class KeyLists:
    """Lists per (batch and interval head, epoch); R = B * Hi.

    entries: (R, epochs, capacity) int32, key numbers.
    sections: (R, epochs, 3) int32: the first entry seen by the whole epoch, the number of entries alive at its start,
        the number of all entries.
    stretches: (R, epochs, tiles, 2) int32, the first entry that a query tile needs and the one after its last.
    """

    entries: torch.Tensor
    sections: torch.Tensor
    stretches: torch.Tensor
    epoch_size: int
    tile_size: int

    @property
    def num_epochs(self) -> int:
        return self.entries.shape[1]

    @property
    def capacity(self) -> int:
        return self.entries.shape[2]

    @property
    def tiles_per_epoch(self) -> int:
        return self.stretches.shape[2]


def choose_epoch_size(seqlen_q: int, max_visible: int) -> int:
    """Returns E, a power of two near w / 4: short enough to look at few dead keys, long enough to store few lists."""
    return min(max(128, min(2048, triton.next_power_of_2(max_visible) // 4)), triton.next_power_of_2(seqlen_q))


def build_key_lists(call: AttentionCall, tile_size: int) -> KeyLists:
    """Builds the lists for query tiles of `tile_size` rows.

    Waits for the device only when `call.max_visible` is None, to count the keys.
    """
    batch, seqlen_q = call.query.shape[:2]
    heads, seqlen_k = call.birth.shape[1:]
    device = call.query.device
    is_listed = call.birth < call.death
    if call.importance is not None:
        is_listed = is_listed & (call.importance > -torch.inf)
    birth = torch.where(is_listed, call.birth, torch.iinfo(torch.int32).max).view(batch * heads, seqlen_k)
    death = torch.where(is_listed, call.death, -1).view(batch * heads, seqlen_k)

    max_visible = call.max_visible
    if max_visible is None:
        max_visible = max(1, _count_visible(birth, death, call))
    epoch_size = choose_epoch_size(seqlen_q, max_visible)
    num_epochs = triton.cdiv(seqlen_q, epoch_size)
    # Rows in no order tell nothing about how many keys an epoch spans.
    capacity = seqlen_k if call.query_start is None else min(seqlen_k, max_visible + epoch_size)

    death_sorted, by_death = death.sort(dim=-1)
    birth_by_death = birth.gather(-1, by_death)
    rows = torch.arange(seqlen_k, device=device, dtype=torch.int32)
    born_in_order = ((birth == rows) | ~is_listed.view(birth.shape)).all(dim=-1).to(torch.int32)

    first, last = _epoch_bounds(call, num_epochs, epoch_size)
    start = torch.searchsorted(death_sorted, first.repeat_interleave(heads, 0), right=True, out_int32=True)
    entries = torch.empty(batch * heads, num_epochs, capacity, dtype=torch.int32, device=device)
    sections = torch.empty(batch * heads, num_epochs, 3, dtype=torch.int32, device=device)
    _fill_lists[(num_epochs, batch * heads)](
        by_death,
        death_sorted,
        birth_by_death,
        birth,
        death,
        born_in_order,
        start,
        first,
        last,
        entries,
        sections,
        seqlen_k,
        num_epochs,
        capacity,
        heads,
        CHUNK=_CHUNK,
    )
    tiles = triton.cdiv(epoch_size, tile_size)
    first, last = _tile_bounds(call, num_epochs, epoch_size, tiles, tile_size)
    stretches = torch.empty(batch * heads, num_epochs, tiles, 2, dtype=torch.int32, device=device)
    _find_stretches[(num_epochs, batch * heads)](
        entries,
        sections,
        birth,
        death,
        first,
        last,
        stretches,
        seqlen_k,
        num_epochs,
        capacity,
        heads,
        tiles,
        TILES=triton.next_power_of_2(tiles),
        CHUNK=128,
    )
    return KeyLists(entries, sections, stretches, epoch_size, tile_size)


def _count_visible(birth: torch.Tensor, death: torch.Tensor, call: AttentionCall) -> int:
    """Returns the largest number of keys that are alive at once, read back from the device."""
    births = birth.sort(dim=-1).values
    deaths = torch.where(death < 0, torch.iinfo(torch.int32).max, death).sort(dim=-1).values
    seqlen_k = births.shape[-1]
    born = torch.arange(1, seqlen_k + 1, device=births.device)
    died = torch.searchsorted(deaths, births, right=True)
    alive = (born - died).masked_fill(births == torch.iinfo(torch.int32).max, 0)
    return int(alive.max())


def _row_bounds(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the lowest and the highest row of the last axis; rows below 0 do not count."""
    first = torch.where(rows < 0, torch.iinfo(torch.int32).max, rows).amin(-1)
    return first.contiguous(), rows.amax(-1).contiguous()


def _epoch_bounds(call: AttentionCall, num_epochs: int, epoch_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the lowest and the highest query row of every epoch, int32 (B, epochs)."""
    return _row_bounds(_padded_rows(call, num_epochs * epoch_size).unflatten(-1, (num_epochs, epoch_size)))


def _tile_bounds(
    call: AttentionCall, num_epochs: int, epoch_size: int, tiles: int, tile_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the lowest and the highest query row of every tile, int32 (B, epochs, tiles)."""
    rows = _padded_rows(call, num_epochs * epoch_size).unflatten(-1, (num_epochs, epoch_size))
    rows = torch.nn.functional.pad(rows, (0, tiles * tile_size - epoch_size), value=-1)
    return _row_bounds(rows.unflatten(-1, (tiles, tile_size)))


def _padded_rows(call: AttentionCall, length: int) -> torch.Tensor:
    rows = call.query_rows()
    return torch.nn.functional.pad(rows, (0, length - rows.shape[-1]), value=-1)


@triton.jit
def _append(entries_ptr, count, keys, is_wanted, capacity):
    place = count + tl.cumsum(is_wanted.to(tl.int32), axis=0) - 1
    tl.store(entries_ptr + place, keys, mask=is_wanted & (place < capacity))
    return count + tl.sum(is_wanted.to(tl.int32), axis=0)


@triton.jit
def _fill_lists(
    by_death_ptr,  # (R, Sk) int64, keys by death
    death_sorted_ptr,  # (R, Sk)
    birth_by_death_ptr,  # (R, Sk)
    birth_ptr,  # (R, Sk)
    death_ptr,  # (R, Sk)
    born_in_order_ptr,  # (R,)
    start_ptr,  # (R, epochs), the first place in by_death that outlives the epoch's first row
    first_ptr,  # (B, epochs)
    last_ptr,  # (B, epochs)
    entries_ptr,  # (R, epochs, capacity)
    sections_ptr,  # (R, epochs, 3)
    seqlen_k,
    num_epochs,
    capacity,
    heads,
    CHUNK: tl.constexpr,
):
    epoch = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    first = tl.load(first_ptr + head // heads * num_epochs + epoch)
    last = tl.load(last_ptr + head // heads * num_epochs + epoch)
    entries_ptr += (head * num_epochs + epoch) * capacity
    sections_ptr += (head * num_epochs + epoch) * 3
    birth_ptr += head * seqlen_k
    death_ptr += head * seqlen_k
    lanes = tl.arange(0, CHUNK)

    count = 0
    num_dying = 0
    for offset in range(tl.load(start_ptr + head * num_epochs + epoch), seqlen_k, CHUNK):
        place = offset + lanes
        is_inside = place < seqlen_k
        birth = tl.load(birth_by_death_ptr + head * seqlen_k + place, mask=is_inside, other=2147483647)
        death = tl.load(death_sorted_ptr + head * seqlen_k + place, mask=is_inside, other=-1)
        key = tl.load(by_death_ptr + head * seqlen_k + place, mask=is_inside, other=0).to(tl.int32)
        is_alive = (birth <= first) & (death > first)
        num_dying += tl.sum((is_alive & (death <= last)).to(tl.int32), axis=0)
        count = _append(entries_ptr, count, key, is_alive, capacity)
    num_alive = tl.minimum(count, capacity)

    in_order = tl.load(born_in_order_ptr + head) != 0
    lowest = tl.where(in_order, tl.minimum(first, seqlen_k) + 1, 0)
    highest = tl.where(last < 0, 0, tl.where(in_order, tl.minimum(last + 1, seqlen_k), seqlen_k))
    for offset in range(tl.minimum(lowest, highest), highest, CHUNK):
        key = offset + lanes
        is_inside = key < highest
        birth = tl.load(birth_ptr + key, mask=is_inside, other=-1)
        death = tl.load(death_ptr + key, mask=is_inside, other=-1)
        is_born = is_inside & (birth > first) & (birth <= last) & (birth < death)
        count = _append(entries_ptr, count, key, is_born, capacity)
    tl.store(sections_ptr, tl.minimum(num_dying, num_alive))
    tl.store(sections_ptr + 1, num_alive)
    tl.store(sections_ptr + 2, tl.minimum(count, capacity))


@triton.jit
def _find_stretches(
    entries_ptr,  # (R, epochs, capacity)
    sections_ptr,  # (R, epochs, 3)
    birth_ptr,  # (R, Sk)
    death_ptr,  # (R, Sk)
    first_ptr,  # (B, epochs, tiles)
    last_ptr,  # (B, epochs, tiles)
    stretches_ptr,  # (R, epochs, tiles, 2)
    seqlen_k,
    num_epochs,
    capacity,
    heads,
    tiles,
    TILES: tl.constexpr,
    CHUNK: tl.constexpr,
):
    epoch = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    tile = tl.arange(0, TILES)
    bounds = (head // heads * num_epochs + epoch) * tiles + tile
    first = tl.load(first_ptr + bounds, mask=tile < tiles, other=0)
    last = tl.load(last_ptr + bounds, mask=tile < tiles, other=-1)
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
