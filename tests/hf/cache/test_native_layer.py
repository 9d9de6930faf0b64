"""A layer of slots for a native window or chunks shows every token what that window or chunk says, in any pieces."""

import random

import pytest
import torch
from conftest import SEED

from flash_dmattn_hf.cache.handover import hand_over
from flash_dmattn_hf.cache.native import NativeCacheLayer

LENGTH, HEADS, GROUP_SIZE = 30, 2, 2


def draw(number, is_chunked):
    """A layer, and which tokens are real (B, LENGTH): padding stands anywhere."""
    rng = random.Random(f"{SEED} {number}")
    generator = torch.Generator().manual_seed(rng.randrange(2**31))
    mask = torch.rand(rng.choice([1, 3]), LENGTH, generator=generator) < rng.choice([0.6, 0.9, 1.1])
    return rng, NativeCacheLayer(0, rng.choice([1, 2, 5, 8, 40]), is_chunked), mask


def seen(layer, mask, start, end):
    """Which rows the tokens start..end see, (B, T, HEADS * GROUP_SIZE, LENGTH), read off what they attend to."""
    batch, count = mask.shape[0], end - start
    value = torch.eye(LENGTH).double()[start:end].expand(batch, HEADS, -1, -1)
    key = torch.zeros(batch, HEADS, count, 4).double()
    assert hand_over.take(None, *layer.update(key, value)) is layer
    query = torch.zeros(batch, count, HEADS * GROUP_SIZE, 4).double()
    attend = layer.step if layer.takes_step else layer.attend
    return attend(query, mask[:, start:end], add_importance_bias=False) > 0


def defined(layer, mask, start, end):
    """The same by definition; a window counts all tokens, a chunk all from the first real one on."""
    reach, position = layer.windows.keep_window_size, (mask.cumsum(1) > 0).cumsum(1) - 1
    t, j = position[:, start:end, None], position[:, None]
    near = t // reach == j // reach if layer.is_chunked else t - j < reach
    is_past = torch.arange(LENGTH) <= torch.arange(start, end)[:, None]
    visible = near & is_past & mask[:, None] & mask[:, start:end, None]
    return visible.unsqueeze(2).expand(-1, -1, HEADS * GROUP_SIZE, -1)


@pytest.mark.parametrize("is_chunked", [False, True], ids=["window", "chunks"])
def test_tokens_see_their_window_or_chunk_in_any_pieces(is_chunked):
    for number in range(40):
        rng, layer, mask = draw(number, is_chunked)
        start = 0
        while start < LENGTH:
            end = min(LENGTH, start + rng.choice([1, 1, 1, 2, 7, 20]))
            assert torch.equal(seen(layer, mask, start, end), defined(layer, mask, start, end)), (number, start)
            assert layer.num_keys <= layer.windows.keep_window_size == layer.keys.shape[2]
            start = end


@pytest.mark.parametrize("is_chunked", [False, True], ids=["window", "chunks"])
def test_tokens_that_are_taken_back_leave_no_trace(is_chunked):
    for number in range(20):
        rng, layer, mask = draw(number, is_chunked)
        start = rng.choice([3, 9, 14])
        seen(layer, mask, 0, start)
        for _ in range(3):
            layer.activate_past_recording()
            end = start + rng.choice([1, 2, 5])
            assert torch.equal(seen(layer, mask, start, end), defined(layer, mask, start, end)), number
            accepted = rng.randint(start, end)
            layer.crop(accepted - end)
            layer.stop_past_recording()
            start = accepted
        assert torch.equal(seen(layer, mask, start, LENGTH), defined(layer, mask, start, LENGTH)), number
