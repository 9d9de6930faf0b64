"""The step of one token: it shows, and drops, what the general selection shows and drops."""

import random

import pytest
import torch
from conftest import SEED

from flash_dmattn import select_visible
from flash_dmattn.ranking import cache_capacity, find_victim, select_survivors


def draw(number):
    """Importances (2, 3, N) with ties and special values, and window sizes."""
    rng = random.Random(f"{SEED} decode {number}")
    w = rng.choice([1, 2, 4, 7, 12])
    s = rng.randint(0, w)
    r = rng.choice([0, rng.randint(0, w - s)])
    generator = torch.Generator().manual_seed(rng.randrange(2**31))
    importance = torch.randint(-2, 3, (2, 3, 40), generator=generator).float()
    importance[importance == 2] = rng.choice([2.0, torch.nan, torch.inf, -torch.inf, -0.0])
    return importance, {"keep_window_size": w, "num_sink_tokens": s, "local_window_size": r}, rng.choice([None, w + 2])


@pytest.mark.parametrize("number", range(20))
def test_one_token_at_a_time_equals_the_general_selection(number):
    importance, windows, sliding_window = draw(number)
    capacity = cache_capacity(windows["keep_window_size"], windows["local_window_size"])
    eviction = {name: size for name, size in windows.items() if name != "keep_window_size"}
    whole = select_visible(importance, sliding_window=sliding_window, **windows)
    kept = torch.empty(2, 3, 0, dtype=torch.int64)  # positions, which here are rows of importance
    for t in range(importance.shape[2]):
        kept = torch.cat([kept, torch.full((2, 3, 1), t)], dim=2)
        strengths, positions = importance.gather(2, kept), kept.int()
        after = torch.full((2,), t + 1, dtype=torch.int32)
        step = select_visible(strengths, positions=positions, sliding_window=sliding_window, **windows)
        seen = torch.zeros_like(importance, dtype=torch.bool)
        seen.scatter_(2, kept, (step.birth <= t) & (t < step.death))
        assert torch.equal(seen, (whole.birth <= t) & (t < whole.death)), t
        survivors = select_survivors(strengths, positions, after, **windows)
        assert survivors.shape[2] == min(t + 1, capacity)
        assert torch.equal(survivors, select_survivors(strengths.double(), positions, after, **windows))
        if kept.shape[2] > capacity:
            victim = find_victim(strengths, positions, after, **eviction)
            everything = torch.cat([survivors, victim.unsqueeze(2)], dim=2).sort(2).values
            assert torch.equal(everything, torch.arange(capacity + 1).expand_as(everything)), t
        kept = kept.gather(2, survivors)


def test_empty_slots_go_first():
    importance = torch.tensor([[[5.0, 1.0, 9.0, 2.0]]])
    positions = torch.tensor([[[0, 1, -1, 2]]], dtype=torch.int32)
    after = torch.tensor([3], dtype=torch.int32)
    assert find_victim(importance, positions, after).tolist() == [[2]]
    assert select_survivors(importance, positions, after, keep_window_size=3).tolist() == [[[0, 3, 1]]]


def test_the_documented_name_of_the_module_stays():
    from flash_dmattn import decode, ranking

    assert all(getattr(decode, name) is getattr(ranking, name) for name in decode.__all__)


def test_windows_that_do_not_fit_are_an_error():
    importance, positions = torch.zeros(1, 1, 1), torch.zeros(1, 1, 1, dtype=torch.int32)
    windows = {"keep_window_size": 2, "num_sink_tokens": 2, "local_window_size": 1}
    with pytest.raises(ValueError, match=r"num_sink_tokens \+ local_window_size must not exceed .* got 2 \+ 1 > 2"):
        select_survivors(importance, positions, torch.tensor([1]), **windows)
