"""Chunks of a prompt find their keys in order, born at their own numbers, and attend as in one forward over all of it.

Backends list keys in one pass where a call has rows in order and such keys, and look at every key in every epoch else.
"""

import random

import pytest
import torch
from conftest import SEED

import flash_dmattn.attention
from flash_dmattn.slots import make_slots
from flash_dmattn_hf.cache.eviction import EvictingLayer
from flash_dmattn_hf.config import Windows

from ..cache_definition import positions_of, sees

LENGTH, GROUP_SIZE, HEAD_DIM = 40, 2, 4


@pytest.fixture
def calls(monkeypatch):
    """The calls that reach the backends."""
    found, attend = [], flash_dmattn.attention.attend

    def recorded(call, backend):
        found.append(call)
        return attend(call, backend)

    monkeypatch.setattr(flash_dmattn.attention, "attend", recorded)
    return found


def make_layer(rng, batch, num_heads, windows):
    """A layer over empty slots, of which none or all count as known to be empty, as in serving."""
    slots = make_slots(batch, num_heads, windows.keep_window_size, HEAD_DIM, torch.float64, "cpu")
    layer = EvictingLayer(windows)
    layer.borrow(slots, torch.float64, rng.choice([0, windows.keep_window_size]))
    layer.row_is_real = torch.ones(batch, windows.keep_window_size, dtype=torch.bool)
    return layer


def attend_densely(query, key, value, importance, real, windows):
    """One forward over all tokens by the definition: (B, N, H, D) of importances (B, H, N)."""
    positions, options = positions_of(real), windows._asdict()
    visible = torch.stack([sees(importance, positions, positions[:, t], **options) for t in range(LENGTH)], dim=2)
    key, value = (states.repeat_interleave(query.shape[2] // states.shape[1], dim=1) for states in (key, value))
    logits = query.transpose(1, 2) @ key.mT * HEAD_DIM**-0.5 + importance.unsqueeze(2)
    weights = logits.masked_fill(~visible, -torch.inf).softmax(-1).nan_to_num()
    return (weights @ value).transpose(1, 2)


@pytest.mark.parametrize("padding", ["no-padding", "padding"])
@pytest.mark.parametrize("per", ["kv-head", "query-head"])
def test_chunks_after_a_cache_have_keys_in_order(calls, per, padding):
    num_chunks = num_old = 0
    for number in range(12):
        rng = random.Random(f"{SEED} ordered {per} {padding} {number}")
        generator = torch.Generator().manual_seed(rng.randrange(2**31))
        batch, w = rng.choice([1, 2]), rng.choice([3, 6, 11])
        s, r = rng.choice([(0, 0), (1, 0), (0, 2), (1, 1)])
        windows = Windows(w, s, r, rng.choice([None, None, w + 4]))
        query, key, value = (
            torch.randn(batch, heads, LENGTH, HEAD_DIM, generator=generator, dtype=torch.float64) for heads in (4, 2, 2)
        )
        num_heads = 2 if per == "kv-head" else 4
        importance = torch.randint(0, 30, (batch, num_heads, LENGTH), generator=generator).double() / 8
        real = torch.ones(batch, LENGTH, dtype=torch.bool)
        if padding == "padding":
            real = torch.rand(batch, LENGTH, generator=generator) < 0.8
        query = query.transpose(1, 2)
        expected = attend_densely(query, key, value, importance.repeat_interleave(4 // num_heads, dim=1), real, windows)
        layer, start = make_layer(rng, batch, num_heads, windows), 0
        while start < LENGTH:
            here = slice(start, min(LENGTH, start + rng.choice([1, 1, 2, 5, 16])))
            mask = real[:, here] if padding == "padding" else None
            repeats = num_heads // 2 if here.stop - start == 1 else 1
            states = (part.repeat_interleave(repeats, dim=1) for part in (key[:, :, here], value[:, :, here]))
            layer.take(*states, importance[:, :, here])
            attend = layer.step if here.stop - start == 1 else layer.attend
            calls.clear()
            torch.testing.assert_close(attend(query[:, here], mask), expected[:, here])
            for call in calls:
                num_keys = call.key.shape[1]
                own = torch.arange(num_keys, dtype=torch.int32).expand_as(call.birth)
                is_listed = call.birth < call.death
                assert call.is_ordered and torch.equal(call.birth[is_listed], own[is_listed]), (number, start)
                assert (call.query_start == num_keys - call.query.shape[1]).all()
                assert (call.query_positions is None) == (mask is None)
                num_chunks += 1
                num_old += int(is_listed[..., : num_keys - call.query.shape[1]].sum())
            start = here.stop
    assert num_chunks > 20 and num_old > 500


def test_a_chunk_keeps_its_keys_in_order_after_single_tokens_have_shuffled_the_slots():
    layer = make_layer(random.Random(0), 1, 1, Windows(4, 0, 1, None))
    order = [0.0, 9.0, 1.0, 8.0, 2.0, 7.0, 3.0]
    for importance in order:
        states = torch.full((1, 1, 1, HEAD_DIM), importance, dtype=torch.float64)
        layer.take(states, states, torch.full((1, 1, 1), importance, dtype=torch.float64))
        layer.step(states, None)
    assert layer.positions.tolist() != layer.positions.sort(-1).values.tolist()
    states = torch.zeros(1, 1, 2, HEAD_DIM, dtype=torch.float64)
    layer.take(states, states, torch.zeros(1, 1, 2, dtype=torch.float64))
    view = layer.view()
    assert view.importance.flatten().tolist() == [9.0, 8.0, 7.0, 3.0, 0.0, 0.0]
    assert view.visibility.birth.flatten().tolist() == list(range(6))
