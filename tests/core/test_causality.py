"""Nothing that comes after a token changes what it sees, what it gives or what it learns from."""

import math

import pytest
import torch

from flash_dmattn import dynamic_mask_attention, select_visible

from .definition import inside_intervals

SEQLEN = 70
WINDOWS = {
    "top-w": {"keep_window_size": 9},
    "sinks-and-local-window": {"keep_window_size": 12, "num_sink_tokens": 2, "local_window_size": 5},
    "sliding-window": {"keep_window_size": 9, "num_sink_tokens": 1, "sliding_window": 15},
}
TAILS = {
    "cut-off": None,
    "other": lambda x: torch.randn_like(x),
    "larger": lambda x: x.abs() + 10,
    "smaller": lambda x: -x.abs() - 10,
    "nan": lambda x: torch.full_like(x, math.nan),
    "inf": lambda x: torch.full_like(x, math.inf),
}
ROWS = [0, 1, 8, 33, SEQLEN - 2]


def with_tail(x, t, tail, dim):
    """x up to and including t along dim, followed by something else or by nothing."""
    head, rest = x.split([t + 1, x.shape[dim] - t - 1], dim)
    return head if TAILS[tail] is None else torch.cat([head, TAILS[tail](rest)], dim)


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("window", WINDOWS)
def test_visibility_up_to_a_row_does_not_depend_on_what_follows(window, tail):
    importance = torch.randn(2, 2, SEQLEN).mul(3).round()
    whole = inside_intervals(select_visible(importance, **WINDOWS[window]), range(SEQLEN))
    for t in ROWS:
        changed = select_visible(with_tail(importance, t, tail, 2), **WINDOWS[window])
        rows = inside_intervals(changed, range(t + 1))
        assert torch.equal(rows[..., : t + 1], whole[:, :, : t + 1, : t + 1])
        assert not rows[..., t + 1 :].any()


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("window", WINDOWS)
def test_outputs_up_to_a_row_do_not_depend_on_what_follows(window, tail):
    query, key, value = torch.randn(2, SEQLEN, 4, 8), *torch.randn(2, 2, SEQLEN, 2, 8)
    importance = torch.randn(2, 2, SEQLEN)
    whole = dynamic_mask_attention(query, key, value, importance, **WINDOWS[window], return_lse=True)
    for t in ROWS:
        inputs = [with_tail(x, t, tail, 1) for x in (query, key, value)]
        out, lse = dynamic_mask_attention(
            *inputs, with_tail(importance, t, tail, 2), **WINDOWS[window], return_lse=True
        )
        torch.testing.assert_close(out[:, : t + 1], whole[0][:, : t + 1])
        torch.testing.assert_close(lse[..., : t + 1], whole[1][..., : t + 1])


@pytest.mark.parametrize("window", WINDOWS)
def test_gradients_with_respect_to_later_inputs_are_exactly_zero(window):
    query, key, value = torch.randn(2, SEQLEN, 4, 8), *torch.randn(2, 2, SEQLEN, 2, 8)
    importance = torch.randn(2, 2, SEQLEN)
    inputs = [x.requires_grad_() for x in (query, key, value, importance)]
    for t in ROWS:
        out, lse = dynamic_mask_attention(*inputs, **WINDOWS[window], return_lse=True)
        lse = torch.where(lse.isfinite(), lse, 0)
        total = out[:, : t + 1].square().sum() + lse[..., : t + 1].sum()
        *by_token, by_importance = torch.autograd.grad(total, inputs)
        assert all((grad[:, t + 1 :] == 0).all() for grad in by_token)
        assert (by_importance[..., t + 1 :] == 0).all()
        assert t == 0 or all((grad != 0).any() for grad in (*by_token, by_importance))
