"""Key lists of the CUDA library hold exactly the keys that the definition asks for, where it asks for them."""

import math
import random

import pytest
import torch
from conftest import SEED

from flash_dmattn import NEVER, Visibility, select_visible
from flash_dmattn.backends.cuda import library, lists
from flash_dmattn.calls import AttentionCall

from .kernel_cases import long_blocks

WHY_NOT = library.why_not_on(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))]


def make_call(birth, death, importance=None, query_start=None, query_positions=None, seqlen_q=None, max_visible=None):
    """A call on the GPU of which only the rows and the intervals matter."""
    batch, heads, seqlen_k = birth.shape
    if query_start is not None:
        query_start = torch.as_tensor(query_start, dtype=torch.int32).expand(batch)
    query = torch.empty(batch, seqlen_q or query_positions.shape[1], heads, 8)
    key = torch.empty(batch, seqlen_k, heads, 8)
    tensors = (query, key, importance, birth, death, query_start, query_positions)
    query, key, importance, birth, death, query_start, query_positions = (
        None if tensor is None else tensor.cuda() for tensor in tensors
    )
    return AttentionCall.prepare(
        query,
        key,
        key,
        importance,
        Visibility(birth, death),
        query_start=query_start,
        query_positions=query_positions,
        max_visible=max_visible,
    )


def check_lists(call: AttentionCall, tile_size: int) -> None:
    built = lists.build_key_lists(call, tile_size)
    assert built.tile_size == tile_size
    batch, heads, seqlen_k = call.birth.shape
    seqlen_q, size = call.query.shape[1], built.epoch_size
    entries, sections, stretches = (x.cpu() for x in (built.entries, built.sections, built.stretches))
    births, deaths = call.birth.cpu().flatten(0, 1).long(), call.death.cpu().flatten(0, 1).long()
    listed = births < deaths
    if call.importance is not None:
        listed &= call.importance.cpu().flatten(0, 1) > -torch.inf
    for lane in range(batch * heads):
        row = call.query_rows()[lane // heads].cpu().long()
        birth, death = births[lane], deaths[lane]
        for epoch in range(built.num_epochs):
            begin, end = epoch * size, min((epoch + 1) * size, seqlen_q)
            real = row[begin:end][row[begin:end] >= 0]
            num_dying, num_alive, total = sections[lane, epoch].tolist()
            stretch = stretches[lane, epoch]
            if len(real) == 0:
                assert total == 0 and not stretch.any()
                continue
            if call.query_start is None:
                first, last = real.min().item(), real.max().item()
                beyond = last
            else:
                first = call.query_start[lane // heads].item() + begin
                last, beyond = first + end - begin - 1, first + size
            alive = listed[lane] & (birth <= first) & (death > first)
            born = (listed[lane] & (birth > first) & (birth <= last)).nonzero().flatten()
            entry = entries[lane, epoch, :total].long()
            if call.importance is not None:
                bias = call.importance.cpu().flatten(0, 1)[lane, entry].clamp(max=2.3e38) * math.log2(math.e)
                torch.testing.assert_close(built.biases[lane, epoch, :total].cpu(), bias)
            where = f"lane {lane}, epoch {epoch} of {built.num_epochs} of {size} rows"
            for got, expected in ((entry[:num_dying], death <= beyond), (entry[num_dying:num_alive], death > beyond)):
                assert torch.equal(got.sort().values, (alive & expected).nonzero().flatten()), where
            assert entry[num_alive:].tolist() == born.tolist(), where
            tile = (torch.arange(begin, end) - begin) // tile_size
            has_rows = torch.zeros(built.tiles_per_epoch, dtype=torch.bool)
            has_rows[tile[row[begin:end] >= 0]] = True
            assert not stretch[~has_rows].any(), where
            for index in has_rows.nonzero().flatten().tolist():
                rows = row[begin:end][(tile == index) & (row[begin:end] >= 0)]
                low, high = stretch[index].tolist()
                needed = (birth[entry] <= rows.max()) & (death[entry] > rows.min())
                assert needed[low:high].sum() == needed.sum(), f"{where}, tile {index}"
                if call.query_start is not None:
                    start = first + index * tile_size
                    assert low == (death[entry[:num_dying]] <= start).sum(), f"{where}, tile {index}"
                    unborn = (birth[entry[num_alive:]] >= start + tile_size).int()
                    assert high == total - unborn.flip(0).cummin(0).values.sum(), f"{where}, tile {index}"


def select(importance, **options):
    moved = {name: value.cuda() if isinstance(value, torch.Tensor) else value for name, value in options.items()}
    return [bound.cpu() for bound in select_visible(importance.cuda(), **moved)]


VALUES = {
    "distinct": torch.randn,
    "up": lambda shape: torch.linspace(0, 9, shape[-1]) + 0.1 * torch.randn(shape),
    "walk": lambda shape: torch.randn(shape).cumsum(-1),
    "constant": torch.zeros,
}


@pytest.mark.parametrize("tile_size", [1, 32, 42, 128])
@pytest.mark.parametrize("values", VALUES)
def test_causal_selections(values, tile_size):
    for seqlen, w, s, r in ((1, 1, 0, 0), (129, 8, 0, 0), (1500, 700, 4, 300), (1200, 100, 2, 0), (900, 900, 0, 0)):
        importance = VALUES[values]((2, 1, seqlen))
        birth, death = select(importance, keep_window_size=w, num_sink_tokens=s, local_window_size=r)
        check_lists(make_call(birth, death, importance, 0, seqlen_q=seqlen, max_visible=w), tile_size)


@pytest.mark.parametrize("seqlen_q", [1, 5, 300, 1999])
def test_fewer_queries_than_keys(seqlen_q):
    importance = torch.randn(1, 2, 2000)
    importance[..., ::7] = -torch.inf
    birth, death = select(importance, keep_window_size=300, sliding_window=500)
    check_lists(make_call(birth, death, importance, 2000 - seqlen_q, seqlen_q=seqlen_q, max_visible=300), 32)
    check_lists(make_call(birth, death, None, 2000 - seqlen_q, seqlen_q=seqlen_q), 32)


def test_padding_and_documents():
    seqlen = 2500
    mask = torch.rand(2, seqlen) < 0.8
    mask[0, 900:] = False
    rows = torch.where(mask, torch.arange(seqlen), -1).int()
    birth, death = select(torch.randn(2, 2, seqlen), keep_window_size=200, padding_mask=mask)
    check_lists(make_call(birth, death, None, 0, rows, max_visible=200), 32)
    bounds = torch.tensor([0, 3, 3, 700, 710, 2400, seqlen], dtype=torch.int32)
    for is_causal in (True, False):
        birth, death = select(torch.randn(1, 2, seqlen), keep_window_size=200, cu_seqlens=bounds, is_causal=is_causal)
        check_lists(make_call(birth, death, None, 0, seqlen_q=seqlen), 32)


@pytest.mark.parametrize("size", [1, 30, 256])
def test_keys_of_blocks(size):
    importance, blocks = torch.randn(1, 2, 2500), long_blocks(2500, size)
    options = {"keep_window_size": 400, "num_sink_tokens": 2, "local_window_size": 256}
    _, death = select(importance, **options)
    birth = blocks.births(torch.arange(2500, dtype=torch.int32).expand(1, 2, -1), death)
    call = make_call(birth, death, importance, 0, seqlen_q=2500, max_visible=400 + size - 1)
    check_lists(call, 32)


def test_keys_and_rows_in_any_order():
    rng = random.Random(SEED)
    for _ in range(10):
        seqlen_q, seqlen_k = rng.randint(1, 900), rng.randint(1, 2000)
        birth = torch.randint(-50, 1500, (2, 2, seqlen_k), dtype=torch.int32)
        death = birth + torch.randint(-5, 900, birth.shape, dtype=torch.int32)
        death[..., ::5] = NEVER
        start = [rng.randint(-20, 1500) for _ in range(2)]
        check_lists(make_call(birth, death, None, start, seqlen_q=seqlen_q), rng.choice([8, 32]))
        rows = torch.randint(-1, 1500, (2, seqlen_q), dtype=torch.int32)
        check_lists(make_call(birth, death, None, None, rows), rng.choice([8, 32]))
        in_order = torch.arange(seqlen_k, dtype=torch.int32).expand(2, 2, -1).contiguous()
        death = in_order + torch.randint(-5, 900, in_order.shape, dtype=torch.int32)
        check_lists(make_call(in_order, death, None, start, seqlen_q=seqlen_q), rng.choice([8, 32]))


def test_two_runs_are_equal_and_do_not_wait_for_the_device():
    importance = torch.randn(1, 4, 20000)
    birth, death = select(importance, keep_window_size=1000)
    call = make_call(birth, death, importance, 0, seqlen_q=20000, max_visible=1000)
    first = lists.build_key_lists(call, 32)
    torch.cuda.set_sync_debug_mode("error")
    try:
        second = lists.build_key_lists(call, 32)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(first.sections, second.sections) and torch.equal(first.stretches, second.stretches)
    used = torch.arange(first.capacity, device="cuda") < first.sections[..., 2:]
    assert torch.equal(first.entries[used], second.entries[used])
