"""Sequences longer than any block: packing, padding and positions agree with plain ones, attention with dense masks."""

import math

import pytest
import torch

from flash_dmattn import Visibility, dynamic_mask_attention, select_visible

from .attention_cases import assert_close, documents
from .definition import NEVER, inside_intervals

SEQLEN = 1100
WINDOWS = {
    "top-w": {"keep_window_size": 300},
    "sinks-and-local-window": {"keep_window_size": 300, "num_sink_tokens": 4, "local_window_size": 130},
    "sliding-window": {"keep_window_size": 300, "num_sink_tokens": 4, "sliding_window": 500},
    "not-causal": {"keep_window_size": 300, "num_sink_tokens": 4, "is_causal": False},
}


def importance_with_ties():
    return torch.randn(1, 2, SEQLEN).mul(50).round()


def some_rows(seqlen):
    return torch.randperm(seqlen)[:60].sort().values.tolist()


@pytest.mark.parametrize("window", WINDOWS)
def test_a_packed_document_sees_what_it_sees_alone(window):
    importance, bounds = importance_with_ties(), documents(1, 500, 0, 249, 350)
    birth, death = select_visible(importance, **WINDOWS[window], cu_seqlens=bounds)
    for start, end in zip(bounds.tolist(), bounds.tolist()[1:], strict=False):
        rows = some_rows(end - start)
        own = Visibility(birth[..., start:end], death[..., start:end])
        alone = select_visible(importance[..., start:end], **WINDOWS[window])
        assert torch.equal(inside_intervals(own, [start + t for t in rows]), inside_intervals(alone, rows))


@pytest.mark.parametrize("window", WINDOWS)
def test_real_tokens_between_padding_see_what_they_see_without_it(window):
    importance, mask = importance_with_ties(), torch.rand(1, SEQLEN) < 0.6
    real = mask[0].nonzero()[:, 0]
    rows = some_rows(len(real))
    padded = inside_intervals(select_visible(importance, **WINDOWS[window], padding_mask=mask), real[rows].tolist())
    alone = inside_intervals(select_visible(importance[..., real], **WINDOWS[window]), rows)
    assert torch.equal(padded[..., real], alone) and not padded[..., ~mask[0]].any()


@pytest.mark.parametrize("window", WINDOWS)
def test_shuffled_keys_with_their_positions_are_seen_as_in_order(window):
    importance, order = importance_with_ties(), torch.randperm(SEQLEN)
    positions = order.int().expand(1, 2, SEQLEN).contiguous()
    rows = some_rows(SEQLEN)
    shuffled = select_visible(importance[..., order], **WINDOWS[window], positions=positions)
    in_order = inside_intervals(select_visible(importance, **WINDOWS[window]), rows)
    assert torch.equal(inside_intervals(shuffled, rows), in_order[..., order])


def dense_attention(query, key, value, importance, visible):
    """All keys under a mask, in float64: out, lse."""
    query, key, value, importance = (x.double() for x in (query, key, value, importance))
    group_size = query.shape[2] // key.shape[2]
    key, value = (x.repeat_interleave(group_size, 2) for x in (key, value))
    logits = torch.einsum("bthd,bjhd->bhtj", query, key) * query.shape[-1] ** -0.5
    logits = (logits + importance.repeat_interleave(group_size, 1)[:, :, None]).masked_fill(~visible, -math.inf)
    return torch.einsum("bhtj,bjhd->bthd", logits.softmax(-1), value), logits.logsumexp(-1)


@pytest.mark.parametrize(("layout", "seqlen_q"), [("one-sequence", SEQLEN), ("one-sequence", 517), ("packed", SEQLEN)])
def test_attention_and_gradients_equal_a_dense_mask(layout, seqlen_q):
    # A local window, so that every query sees a key.
    options = {"keep_window_size": 300, "num_sink_tokens": 4, "local_window_size": 130}
    if layout == "packed":
        options["cu_seqlens"] = documents(1, 500, 0, 249, 350)
    query, key, value = torch.randn(1, seqlen_q, 4, 16), *torch.randn(2, 1, SEQLEN, 2, 16)
    inputs = [x.requires_grad_() for x in (query, key, value, torch.randn(1, 2, SEQLEN))]
    rows = range(SEQLEN - seqlen_q, SEQLEN)
    visible = inside_intervals(select_visible(inputs[3], **options), rows).repeat_interleave(2, 1)
    got = dynamic_mask_attention(*inputs, **options, return_lse=True)
    expected = dense_attention(*inputs, visible)
    weights = [torch.randn_like(x) for x in got]
    found = torch.autograd.grad(got, inputs, weights)
    right = torch.autograd.grad(expected, inputs, [x.double() for x in weights])
    names = ["out", "lse", "dquery", "dkey", "dvalue", "dimportance"]
    for name, mine, other in zip(names, (*got, *found), (*expected, *right), strict=True):
        assert_close(name, mine, other.double(), torch.float32)


def test_positions_far_apart_and_late_are_as_good_as_early_ones():
    importance, gaps = importance_with_ties(), torch.randint(1, 10**6, (SEQLEN,))
    late = (NEVER - 1 - gaps.cumsum(0)).flip(0)
    options = {"keep_window_size": 300}  # no window that counts positions
    rows = some_rows(SEQLEN)
    early = inside_intervals(select_visible(importance, **options), rows)
    visibility = select_visible(importance, **options, positions=late.int().expand(1, 2, SEQLEN).contiguous())
    assert torch.equal(inside_intervals(visibility, late[rows].tolist()), early)
