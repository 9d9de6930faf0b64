"""What each option of select_visible means, stated one at a time."""

import pytest
import torch

from flash_dmattn import Visibility, select_visible

from .definition import NEVER, inside_intervals

INF = float("inf")


def select(values, w, s=0, r=0, **options):
    """birth and death, as lists, of one sequence."""
    importance = torch.as_tensor(values)[None, None]
    visibility = select_visible(importance, keep_window_size=w, num_sink_tokens=s, local_window_size=r, **options)
    return visibility.birth[0, 0].tolist(), visibility.death[0, 0].tolist()


@pytest.mark.parametrize("shape", [(2, 3, 17), (1, 1, 1), (2, 3, 0)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_the_result_is_two_int32_tensors_shaped_like_the_importance(shape, dtype):
    visibility = select_visible(torch.randn(shape).to(dtype).requires_grad_(), keep_window_size=4)
    assert isinstance(visibility, Visibility)
    for bound in visibility:
        assert bound.shape == shape and bound.dtype == torch.int32 and not bound.requires_grad


def test_equal_importance_gives_a_sliding_window():
    birth, death = select([0.0] * 6, w=3)
    assert birth == [0, 1, 2, 3, 4, 5]
    assert death[:3] == [3, 4, 5] and all(d >= 6 for d in death[3:])


def test_a_key_leaves_when_w_better_ones_have_come():
    birth, death = select([5.0, 1.0, 4.0, 2.0, 3.0, 9.0], w=2)
    assert death[0] >= 6 and death[1] == 2 and death[2] == 5 and death[3] <= 3 and death[4] <= 4
    assert birth == [0, 1, 2, 3, 4, 5]


def test_a_query_may_not_see_itself():
    birth, death = select([3.0, 2.0, 1.0], w=2)
    assert death[2] <= birth[2] == 2


def test_the_newer_key_wins_a_tie():
    _, death = select([1.0, 1.0, 1.0], w=1)
    assert death[:2] == [1, 2] and death[2] >= 3


def test_all_keys_that_fit_live_for_ever():
    assert select([3.0, -1.0, 2.0], w=3) == ([0, 1, 2], [NEVER] * 3)


def test_sinks_never_die_and_take_no_part_in_the_competition():
    birth, death = select([9.0, -9.0, 1.0, 2.0, 3.0], w=3, s=2)
    assert birth == [0, 1, 2, 3, 4]
    assert death[:2] == [NEVER, NEVER] and death[2:4] == [3, 4] and death[4] >= 5


def test_a_local_window_delays_the_competition():
    values = torch.randn(40).tolist()
    _, competing = select(values, w=5)
    _, delayed = select(values, w=9, r=4)
    for j in range(36):
        if competing[j] + 4 < 40:
            assert delayed[j] == max(competing[j], j) + 4
        else:
            assert delayed[j] >= 40


def test_without_competition_only_sinks_and_the_local_window_are_seen():
    birth, death = select(torch.randn(9), w=5, s=2, r=3)
    assert birth == list(range(9))
    assert death[:6] == [NEVER, NEVER, 5, 6, 7, 8] and all(d >= 9 for d in death[6:])


def test_a_sliding_window_bounds_every_key_and_older_keys_still_compete():
    _, death = select([9.0, 1.0, 2.0, 3.0, 0.0], w=2, s=1, sliding_window=2)
    assert death[0] == 2  # a sink as well
    assert death[1] == 2
    _, death = select([9.0, 1.0, 2.0, 3.0], w=1, sliding_window=2)
    assert death[0] == 2 and all(d <= j for j, d in enumerate(death) if j)


@pytest.mark.parametrize("length", [NEVER, NEVER - 1, 2**30])
def test_a_huge_sliding_window_does_not_wrap(length):
    birth, death = select([1.0, 1.0, 1.0], w=3, sliding_window=length)
    assert all(d >= min(length, NEVER) and d > b for b, d in zip(birth, death, strict=True))
    importance, positions = torch.zeros(1, 1, 2), torch.tensor([[[NEVER - 1, NEVER - 2]]], dtype=torch.int32)
    visibility = select_visible(
        importance, keep_window_size=9, local_window_size=4, sliding_window=length, positions=positions
    )
    assert visibility.birth.flatten().tolist() == [NEVER - 1, NEVER - 2]
    assert visibility.death.flatten().tolist() == [NEVER, NEVER]


@pytest.mark.parametrize("s", [0, 4])
def test_huge_windows_do_not_wrap(s):
    birth, death = select([3.0, 2.0, 1.0], w=NEVER, s=s, r=NEVER - s, sliding_window=NEVER)
    assert birth == [0, 1, 2] and death == [NEVER] * 3


def test_without_causality_the_top_keys_are_seen_by_all_queries():
    birth, death = select([0.0, 3.0, 1.0, 2.0, 2.0], w=3, s=1, is_causal=False)
    assert (birth[0], death[0]) == (birth[1], death[1]) == (birth[4], death[4]) == (0, NEVER)
    assert birth[2] == death[2] and birth[3] == death[3]


def test_without_causality_a_packed_key_lives_in_its_document():
    bounds = torch.tensor([0, 2, 2, 5], dtype=torch.int32)
    birth, death = select([1.0, 2.0, 1.0, 3.0, 2.0], w=2, is_causal=False, cu_seqlens=bounds)
    assert list(zip(birth, death, strict=True))[:2] == [(0, 2), (0, 2)]
    assert birth[2] == death[2] and list(zip(birth, death, strict=True))[3:] == [(2, 5), (2, 5)]


def test_packed_documents_are_sequences_of_their_own():
    values, lengths = torch.randn(1, 2, 30), [7, 0, 1, 15, 7]
    bounds = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    options = {"keep_window_size": 5, "num_sink_tokens": 1, "local_window_size": 2}
    packed = select_visible(values, **options, cu_seqlens=bounds)
    assert torch.equal(packed.birth[0, 0], torch.arange(30, dtype=torch.int32))
    for start, end in zip(bounds.tolist(), bounds.tolist()[1:], strict=False):
        alone = select_visible(values[:, :, start:end], **options)
        assert (packed.death[:, :, start:end] <= end).all()
        assert (packed.death[:, :, start:end][:, :, :1] == end).all()  # the sink
        rows = range(end - start)
        inside = inside_intervals(
            Visibility(packed.birth[:, :, start:end], packed.death[:, :, start:end]), range(start, end)
        )
        assert torch.equal(inside, inside_intervals(alone, rows))


def test_padding_takes_no_place_in_the_window():
    birth, death = select(
        [9.0, 1.0, 9.0, 2.0, 9.0, 0.0],
        w=2,
        s=1,
        padding_mask=torch.tensor([[False, True, False, True, False, True]]),
    )
    assert (birth[1], death[1]) == (1, NEVER)  # the sink is the first real token
    assert birth[3] == 3 and death[3] > 5
    assert death[5] <= birth[5]
    assert all(death[j] <= max(birth[j], 0) for j in (0, 2, 4))


def test_positions_decide_and_are_returned():
    positions = torch.tensor([[[100, -1, 7, 40]]], dtype=torch.int32)
    importance = torch.tensor([[[1.0, 99.0, 1.0, 5.0]]])
    visibility = select_visible(importance, keep_window_size=2, positions=positions)
    birth, death = (bound[0, 0].tolist() for bound in visibility)
    assert (birth[0], birth[2], birth[3]) == (100, 7, 40)
    assert death[2] == 100 and death[3] == NEVER and death[0] > 100
    assert not inside_intervals(visibility, [-1, 0, 99, 100, NEVER - 1])[..., 1].any()


SPECIAL_VALUES = {
    "nan-is-minus-infinity": ([float("nan"), -INF, float("nan"), -1.0], [1, 2, 3, 4]),
    "minus-zero-equals-zero": ([-0.0, 0.0, -0.0], [1, 2, 3]),
    "infinity-is-the-float32-maximum": ([INF, torch.finfo(torch.float32).max, INF], [1, 2, 3]),
    "infinity-is-not-smaller": ([INF, 3e38], [2, 1]),
}


@pytest.mark.parametrize(("values", "expected_death"), SPECIAL_VALUES.values(), ids=list(SPECIAL_VALUES))
def test_special_values_rank(values, expected_death):
    birth, death = select(values, w=1)
    for b, d, expected in zip(birth, death, expected_death, strict=True):
        assert d <= b if expected <= b else min(d, len(values)) == expected


def test_float64_importance_is_compared_in_float64():
    values = torch.tensor([1 + 1e-12, 1.0], dtype=torch.float64)
    birth, death = select(values, w=1)
    assert death[0] >= 2 and death[1] <= 1
    assert select(values.float(), w=1)[1][0] == 1


def test_the_importance_may_be_a_strided_view():
    wide = torch.randn(2, 20, 6)
    view = wide[:, ::2, ::3].transpose(1, 2)
    for got, expected in zip(
        select_visible(view, keep_window_size=3),
        select_visible(view.contiguous(), keep_window_size=3),
        strict=True,
    ):
        assert torch.equal(got, expected)
