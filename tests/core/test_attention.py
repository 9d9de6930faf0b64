"""Outputs and lse equal the definition in float64."""

import math

import pytest
import torch

from flash_dmattn import Visibility, dynamic_mask_attention, interval_attention, select_visible

from . import definition
from .attention_cases import CASES, assert_close, padding, window


@pytest.mark.parametrize("case", CASES, ids=str)
def test_dynamic_mask_attention_equals_the_definition(case):
    inputs = case.inputs()
    out, lse = dynamic_mask_attention(*inputs, **case.options, return_lse=True)
    options = {name: x for name, x in case.options.items() if name != "max_seqlen"}
    expected_out, expected_lse = definition.dynamic_mask_attention(*inputs, **options)
    assert out.dtype == case.dtype
    assert lse.dtype == (torch.float64 if case.dtype == torch.float64 else torch.float32)
    assert_close("out", out, expected_out, case.dtype)
    assert_close("lse", lse, expected_lse, torch.float64 if case.dtype == torch.float64 else torch.float32)
    assert torch.equal(out, dynamic_mask_attention(*inputs, **case.options))


def random_intervals(shape, num_rows):
    """Intervals in no order; some are empty, some end before they begin, some never end."""
    birth = torch.randint(-3, num_rows, shape, dtype=torch.int32)
    death = birth + torch.randint(-3, num_rows, shape, dtype=torch.int32)
    return Visibility(birth, torch.where(torch.rand(shape) < 0.2, definition.NEVER, death))


HEADS = {
    "group-of-1": (2, 2, 2),
    "group-of-3": (6, 2, 2),
    "group-of-4": (4, 1, 1),
    "per-query-head": (4, 2, 4),
}
QUERIES = {
    "last-rows": ({}, [[20, 21, 22, 23, 24, 25]] * 2),
    "start": ({"query_start": 3}, [[3, 4, 5, 6, 7, 8]] * 2),
    "start-per-batch-row": (
        {"query_start": torch.tensor([0, 19], dtype=torch.int32)},
        [range(6), range(19, 25)],
    ),
    "positions": (
        {"query_positions": torch.tensor([[-1, -1, 0, 5, 25, 9], [2, 2, -1, 400, -1, 7]], dtype=torch.int32)},
        [[-1, -1, 0, 5, 25, 9], [2, 2, -1, 400, -1, 7]],
    ),
    "start-and-positions": (
        {
            "query_start": 18,
            "query_positions": torch.tensor([[18, -1, 20, -1, -1, 23], [-1, 19, 20, 21, 22, -1]], dtype=torch.int32),
        },
        [[18, -1, 20, -1, -1, 23], [-1, 19, 20, 21, 22, -1]],
    ),
    "late-positions": (
        {"query_start": definition.NEVER - 6},
        [range(definition.NEVER - 6, definition.NEVER)] * 2,
    ),
}


@pytest.mark.parametrize("queries", QUERIES)
@pytest.mark.parametrize("heads", HEADS)
def test_interval_attention_equals_the_definition_for_any_intervals(heads, queries):
    num_heads, num_kv_heads, num_lanes = HEADS[heads]
    arguments, rows = QUERIES[queries]
    query, key, value = torch.randn(2, 6, num_heads, 8), *torch.randn(2, 2, 26, num_kv_heads, 8)
    importance = torch.randn(2, num_lanes, 26)
    visibility = random_intervals(importance.shape, 26)
    visibility.birth.clamp_(min=0)  # the row -1 sees nothing
    out, lse = interval_attention(query, key, value, importance, visibility, **arguments, return_lse=True)
    visible = definition.inside_intervals(visibility, [list(row) for row in rows])
    expected_out, expected_lse = definition.attention(query, key, value, importance, visible)
    assert_close("out", out, expected_out, torch.float32)
    assert_close("lse", lse, expected_lse, torch.float32)


def test_the_order_of_the_keys_does_not_matter():
    query, key, value = torch.randn(1, 9, 4, 8), *torch.randn(2, 1, 30, 2, 8)
    importance = torch.randn(1, 2, 30)
    visibility = select_visible(importance, keep_window_size=6, num_sink_tokens=1)
    order = torch.randperm(30)
    shuffled = Visibility(*(bound[..., order] for bound in visibility))
    torch.testing.assert_close(
        interval_attention(query, key[:, order], value[:, order], importance[..., order], shuffled),
        interval_attention(query, key, value, importance, visibility),
    )


def test_knowing_how_many_keys_a_query_sees_changes_nothing():
    query, key, value = torch.randn(1, 40, 4, 8), *torch.randn(2, 1, 40, 2, 8)
    importance = torch.randn(1, 2, 40)
    visibility = select_visible(importance, keep_window_size=6, local_window_size=2)
    arguments = (query, key, value, importance, visibility)
    torch.testing.assert_close(interval_attention(*arguments, max_visible=6), interval_attention(*arguments))


@pytest.mark.parametrize("is_causal", [True, False])
def test_a_window_beyond_all_integers_shows_everything(is_causal):
    query, key, value = torch.randn(3, 1, 12, 2, 8)
    importance = torch.randn(1, 2, 12)
    all_of_them, wide = (
        dynamic_mask_attention(query, key, value, importance, keep_window_size=size, is_causal=is_causal)
        for size in (12, 2**64)
    )
    torch.testing.assert_close(wide, all_of_them)


def test_autocast_leaves_the_logits_in_full_precision():
    """A constant added to all importances changes nothing, unless logits are rounded."""
    tensors = [x.bfloat16().requires_grad_() for x in (torch.randn(1, 40, 4, 8), *torch.randn(2, 1, 40, 2, 8))]
    importance, dout = torch.randn(1, 2, 40), torch.randn(1, 40, 4, 8)

    def results(shift):
        out = dynamic_mask_attention(*tensors, importance + shift, keep_window_size=9)
        return out, *torch.autograd.grad(out, tensors, dout.to(out.dtype))

    expected = results(0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = results(1000)
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-2, rtol=2e-2)


def test_a_query_that_sees_nothing_gets_zero():
    query, key, value = torch.randn(3, 1, 4, 2, 8)
    nothing = Visibility(*torch.full((2, 1, 2, 4), 2, dtype=torch.int32))
    out, lse = interval_attention(query, key, value, torch.randn(1, 2, 4), nothing, return_lse=True)
    assert (out == 0).all() and (lse == -math.inf).all()


def test_padded_queries_give_zero_whatever_stands_in_them():
    mask = padding("0001111111110", "1110000101111")
    query, key, value = torch.randn(3, 2, 13, 2, 8)
    importance = torch.randn(2, 2, 13)
    options = window(4, 1, 1, padding_mask=mask, return_lse=True)
    out, lse = dynamic_mask_attention(query, key, value, importance, **options)
    assert (out[~mask] == 0).all() and (lse.transpose(1, 2)[~mask] == -math.inf).all()
    for garbage in (math.nan, math.inf, -math.inf, 1e30):
        dirty = [x.masked_fill(~mask[:, :, None, None], garbage) for x in (query, key, value)]
        dirty_importance = importance.masked_fill(~mask[:, None], garbage)
        for got, clean in zip(dynamic_mask_attention(*dirty, dirty_importance, **options), (out, lse), strict=True):
            assert torch.equal(got, clean)


@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf], ids=str)
def test_garbage_in_an_unseen_key_does_not_reach_a_query(garbage):
    query, key, value = torch.randn(3, 1, 40, 2, 8)
    importance = torch.randn(1, 2, 40)
    options = window(6, 1, 2)
    visible = definition.visible_keys(importance, **options)
    clean = dynamic_mask_attention(query, key, value, importance, **options)
    for j in (0, 7, 20, 39):
        dirty_key, dirty_value = key.clone(), value.clone()
        dirty_key[:, j] = dirty_value[:, j] = garbage
        dirty = dynamic_mask_attention(query, dirty_key, dirty_value, importance, **options)
        unaffected = ~visible[:, :, :, j].transpose(1, 2)  # (B, Sq, H)
        assert unaffected.any() or j == 0
        torch.testing.assert_close(dirty[unaffected], clean[unaffected])


@pytest.mark.parametrize("importance", ["given", "none"])
def test_without_the_bias_the_importance_only_selects(importance):
    query, key, value = torch.randn(3, 1, 12, 2, 8)
    given = torch.randn(1, 2, 12)
    visibility = select_visible(given, keep_window_size=4)
    expected, _ = definition.attention(
        query,
        key,
        value,
        given,
        definition.inside_intervals(visibility, range(12)),
        add_importance_bias=False,
    )
    passed = given if importance == "given" else None
    got = interval_attention(query, key, value, passed, visibility, add_importance_bias=False)
    assert_close("out", got, expected, torch.float32)


def test_with_enough_room_and_no_importance_it_is_dense_causal_attention():
    query, key, value = torch.randn(2, 20, 6, 8), *torch.randn(2, 2, 20, 3, 8)
    got = dynamic_mask_attention(query, key, value, torch.zeros(2, 3, 20), keep_window_size=20)
    heads_first = [x.transpose(1, 2) for x in (query, key, value)]
    dense = torch.nn.functional.scaled_dot_product_attention(*heads_first, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(got, dense.transpose(1, 2))
