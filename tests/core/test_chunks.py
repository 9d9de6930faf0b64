"""A pruned cache loses nothing: chunks that keep only surviving keys see the same keys as one pass."""

import random

import pytest
import torch
from conftest import SEED

from flash_dmattn import Blocks, select_visible

from .definition import NEVER, inside_intervals, visible_keys

SEQLEN = 60
WINDOWS = {
    "w=8": {"keep_window_size": 8},
    "w=1": {"keep_window_size": 1},
    "sinks": {"keep_window_size": 8, "num_sink_tokens": 3},
    "local-window": {"keep_window_size": 12, "local_window_size": 7},
    "sinks-and-local-window": {"keep_window_size": 12, "num_sink_tokens": 2, "local_window_size": 5},
    "no-competition": {"keep_window_size": 9, "num_sink_tokens": 4, "local_window_size": 5},
    "sliding-window": {"keep_window_size": 10, "num_sink_tokens": 1, "sliding_window": 17},
    "short-sliding-window": {"keep_window_size": 10, "local_window_size": 4, "sliding_window": 6},
    "all-fit": {"keep_window_size": SEQLEN, "num_sink_tokens": 1, "local_window_size": 2},
}
CHUNKS = {
    "token-by-token": lambda rng: [1] * SEQLEN,
    "prefill-then-tokens": lambda rng: [SEQLEN // 2] + [1] * (SEQLEN - SEQLEN // 2),
    "random": lambda rng: [rng.randint(1, 15) for _ in range(SEQLEN)],
}
VALUES = {"distinct": lambda x: x, "ties": torch.round, "constant": torch.zeros_like}


def max_size(births):
    """Tokens of the longest block."""
    return int(births.bincount().max())


class PrunedKeys:
    """Per head the positions that may still be seen, in a random order of slots.

    births: (SEQLEN,) int32, the position at which the block of each key begins, or None without blocks.
    """

    def __init__(self, importance, options, rng, births=None):
        self.importance, self.options, self.rng, self.births = importance, options, rng, births
        self.kept = [[] for _ in range(importance.shape[1])]

    def process(self, start, end):
        """Visible keys of the queries [start, end), bool (Hi, end - start, SEQLEN); then forgets the dead."""
        for positions in self.kept:
            positions += range(start, end)
            self.rng.shuffle(positions)
        num_slots = max(len(positions) for positions in self.kept) + self.rng.randint(0, 2)
        slots = torch.tensor([[*kept, *[-1] * (num_slots - len(kept))] for kept in self.kept])
        importance = torch.where(slots < 0, torch.nan, self.importance[0].gather(1, slots.clamp(min=0)))
        arguments = {**self.options, "positions": slots.int()[None]}
        if self.births is not None:
            arguments["blocks"] = Blocks(self.births[slots.clamp(min=0)][None], max_size(self.births))
        inside = inside_intervals(select_visible(importance[None], **arguments), range(start, end))[0]
        visible = torch.zeros(len(self.kept), end - start, SEQLEN + 1, dtype=torch.int64)
        visible.scatter_add_(2, slots.where(slots >= 0, SEQLEN)[:, None].expand_as(inside), inside.long())
        assert not visible[..., SEQLEN].any()  # empty slots
        # A key hidden by the sliding window still competes.
        death = select_visible(importance[None], **(arguments | {"sliding_window": None})).death[0]
        self.kept = [row[(row >= 0) & (d > end)].tolist() for row, d in zip(slots, death, strict=True)]
        return visible[..., :SEQLEN].bool()


@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize("chunks", CHUNKS)
@pytest.mark.parametrize("window", WINDOWS)
def test_chunks_see_the_same_keys_as_one_pass(window, chunks, values):
    rng = random.Random(SEED)
    options = WINDOWS[window]
    importance = VALUES[values](torch.randn(1, 2, SEQLEN))
    expected = visible_keys(importance, **options)[0]
    keys, start = PrunedKeys(importance, options, rng), 0
    for length in CHUNKS[chunks](rng):
        end = min(start + length, SEQLEN)
        if start < end:
            assert torch.equal(keys.process(start, end), expected[:, start:end])
            assert max(len(kept) for kept in keys.kept) <= options["keep_window_size"]
        start = end
    assert start == SEQLEN


@pytest.mark.parametrize("window", WINDOWS)
def test_a_key_that_a_query_no_longer_sees_never_comes_back(window):
    visible = visible_keys(torch.randn(1, 3, SEQLEN).round(), **WINDOWS[window])
    ended = visible[:, :, :-1] & ~visible[:, :, 1:]
    later = visible.flip(2).cummax(2).values.flip(2)[:, :, 1:]
    assert not (ended & later).any()
    assert (visible.sum(-1) <= WINDOWS[window]["keep_window_size"]).all()


def test_chunks_at_the_end_of_the_int32_range_see_the_same_keys():
    first = NEVER - 30
    importance = torch.randn(1, 1, 30)
    positions = torch.arange(first, NEVER, dtype=torch.int32)[None, None]
    options = {"keep_window_size": 9, "local_window_size": 4, "sliding_window": 2**31 - 1}
    queries = list(range(first, NEVER))
    expected = visible_keys(importance, **options, positions=positions, queries=queries)
    whole = select_visible(importance, **options, positions=positions)
    assert torch.equal(inside_intervals(whole, queries), expected)
    alive = (whole.death > first + 15) & (positions < first + 15) | (positions >= first + 15)
    pruned = select_visible(importance[alive][None, None], **options, positions=positions[alive][None, None])
    assert torch.equal(inside_intervals(pruned, queries[15:]), expected[:, :, 15:, alive[0, 0]])
