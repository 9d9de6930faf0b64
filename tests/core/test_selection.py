"""select_visible shows each query exactly the keys of the definition."""

from functools import cache
from itertools import combinations

import pytest
import torch

from flash_dmattn import select_visible

from .definition import NEVER, inside_intervals, visible_keys
from .selection_cases import LAYOUTS, NUM_CASES, draw_cases, options_of, required_pairs


@cache
def all_cases():
    return list(draw_cases())


def queries_of(case):
    """The rows of the key axis; with positions, those around which something can change (at most 60)."""
    positions = case.options.get("positions")
    if positions is None:
        return list(range(case.importance.shape[2]))
    r, length = case.options["local_window_size"], case.options.get("sliding_window", 0)
    steps = [-1, 0, 1, r - 1, r, r + 1, length - 1, length, length + 1]
    found = {0, NEVER - 1} | {p + step for p in positions.flatten().tolist() for step in steps if p >= 0}
    found = sorted(t for t in found if 0 <= t < NEVER)
    return found[:: -(-len(found) // 60)] + [NEVER - 1]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_random_cases_equal_the_definition(layout):
    for case in all_cases():
        if case.layout != layout:
            continue
        queries = queries_of(case)
        expected = visible_keys(case.importance, **case.options, queries=queries if layout == "positions" else None)
        got = inside_intervals(select_visible(case.importance, **case.options), queries)
        mask = case.options.get("padding_mask")
        if mask is not None:  # a padded query's own row means nothing, but no query sees a padded key
            assert not got.masked_select(~mask[:, None, None, :]).any(), f"a padded key is visible in {case}"
            got = got & mask[:, None, :, None]
        assert torch.equal(got, expected), f"{(got != expected).nonzero()[:5].tolist()} differ in {case}"


def test_every_pair_of_options_occurs_among_at_least_500_cases():
    found = set()
    for case in all_cases():
        found |= set(combinations(sorted(options_of(case)), 2))
    assert len(all_cases()) == NUM_CASES >= 500
    assert required_pairs() <= found


def rows_by_comparison(importance, rows, w, s, r):
    """Visibility of some rows of one long sequence, (T, Sk), by comparing all pairs of keys."""
    j = torch.arange(len(importance))
    beats = importance[:, None] > importance[None, :]
    beats |= (importance[:, None] == importance[None, :]) & (j[:, None] > j[None, :])  # i beats j
    beats[:s] = False
    visible = []
    for t in rows:
        num_better = beats[: max(t - r + 1, 0)].sum(0)
        visible.append((j <= t) & ((j < s) | (t - j < r) | (num_better < w - s - r)))
    return torch.stack(visible)


LONG_VALUES = {
    "distinct": lambda x: x,
    "ties": lambda x: x.mul(2).round(),
    "rectified": lambda x: x.relu(),
    "ascending": lambda x: x.sort().values,
    "descending": lambda x: x.sort(descending=True).values,
    "constant": lambda x: x * 0,
}


@pytest.mark.parametrize("values", LONG_VALUES)
@pytest.mark.parametrize("window", [(1, 0, 0), (700, 0, 0), (1000, 4, 500)], ids=["w=1", "w=700", "w=1000-s=4-r=500"])
def test_long_sequences_equal_the_definition(window, values):
    w, s, r = window
    seqlen = 2203
    importance = LONG_VALUES[values](torch.randn(seqlen))
    rows = [*range(0, seqlen, 211), w - 1, w, w + 1, 2047, 2048, seqlen - 1]
    visibility = select_visible(importance[None, None], keep_window_size=w, num_sink_tokens=s, local_window_size=r)
    expected = rows_by_comparison(importance, rows, w, s, r)
    assert torch.equal(inside_intervals(visibility, rows)[0, 0], expected)
