"""Key lists built by three kernels and a sort, for any order of keys."""

import torch
import triton
import triton.language as tl

from flash_dmattn.backends.key_lists import (
    LARGEST_BIAS,
    KeyLists,
    allocate_key_lists,
    choose_capacity,
    choose_epoch_size,
    count_visible,
    is_listed,
    whole_sequence,
)
from flash_dmattn.backends.triton.tiles import LOG2E, query_rows
from flash_dmattn.calls import AttentionCall

_CHUNK = 1024


def build_key_lists(call: AttentionCall, tile_size: int) -> KeyLists:
    """Builds the lists for query tiles of `tile_size` rows.

    Waits for the device only when intervals come without `call.max_visible`, to count the keys.
    """
    if not is_listed(call):
        return whole_sequence(call, tile_size)
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

    max_visible = count_visible(birth, death) if call.max_visible is None else call.max_visible
    epoch_size = choose_epoch_size(seqlen_q, max_visible)
    lists = allocate_key_lists(call, choose_capacity(call, birth, death, epoch_size), epoch_size, tile_size)
    num_epochs, capacity, tiles = lists.num_epochs, lists.capacity, lists.tiles_per_epoch
    entries, biases, sections = lists.entries, lists.biases, lists.sections
    rows = (
        call.first_rows() if call.is_ordered else death,
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
        LARGEST_BIAS=LARGEST_BIAS,
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
        lists.stretches,
        *sizes,
        tiles,
        TILE=tile_size,
        TILES=triton.next_power_of_2(tiles),
        LANES=triton.next_power_of_2(tile_size),
        HAS_START=call.is_ordered,
        CHUNK=128,
        **constants,
    )
    return lists


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
