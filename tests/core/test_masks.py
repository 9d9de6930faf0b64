"""Masks of top keys per query, the way back to intervals, and the function that models call with them."""

import types

import pytest
import torch

from flash_dmattn import NEVER, dynamic_mask_attention, flash_dmattn_func, interval_attention
from flash_dmattn.integrations.flash_dynamic_mask_attention import flash_dynamic_mask_attention_forward
from flash_dmattn.utils.mask import create_mask, mask_to_visibility

from .dense_cases import definition

LOWEST = torch.finfo(torch.float32).min


def top_keys(bias, allowed, window_size, is_causal=True):
    """bool (Sq, Sk) by a loop over queries: the newer key wins a tie."""
    seqlen_q, seqlen_k = allowed.shape
    mask = torch.zeros(seqlen_q, seqlen_k, dtype=torch.bool)
    for i in range(seqlen_q):
        last = i + seqlen_k - seqlen_q if is_causal else seqlen_k - 1
        keys = [j for j in range(last + 1) if allowed[i, j] and bias[i, j] > LOWEST]
        keys.sort(key=lambda j: (bias[i, j].item(), j), reverse=True)
        mask[i, keys[:window_size]] = True
    return mask


@pytest.mark.parametrize("rows", [1, 12], ids=["bias-by-key", "bias-by-query"])
@pytest.mark.parametrize("masked", ["nothing", "keys", "queries", "pairs"])
@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "whole"])
def test_a_mask_holds_the_top_keys_of_each_query(rows, masked, is_causal):
    seqlen_q, seqlen_k = 12, 17
    bias = torch.randn(2, 3, rows, seqlen_k).mul(2).round()  # with ties
    bias[torch.rand_like(bias) < 0.1] = LOWEST
    mask, pairs = None, torch.ones(2, 1, seqlen_q, seqlen_k, dtype=torch.bool)
    if masked == "pairs":
        mask = pairs = torch.rand(2, 1, seqlen_q, seqlen_k) > 0.3
    elif masked != "nothing":
        mask = torch.rand(2, seqlen_k if masked == "keys" else seqlen_q) > 0.3
        older = torch.ones(2, seqlen_k - mask.shape[1], dtype=torch.bool)
        pairs = torch.cat([older, mask], dim=1)[:, None, None].expand_as(pairs)
    found = create_mask(bias, mask, 2, seqlen_q, seqlen_k, 5, LOWEST, is_causal=is_causal)
    assert found.shape == (2, 3, seqlen_q, seqlen_k) and found.dtype == torch.bool
    for batch in range(2):
        for head in range(3):
            given = bias[batch, head].expand(seqlen_q, seqlen_k)
            assert torch.equal(found[batch, head], top_keys(given, pairs[batch, 0], 5, is_causal))


def test_blocks_vote_by_more_than_half_and_stay_in_the_past():
    bias = torch.tensor([5.0, 4, 0, 0, 3, 0, 0, 0, 2, 1])[None, None, None]
    found = create_mask(bias, None, 1, 10, 10, 5, LOWEST, block_size=4, is_causal=False)[0, 0, 0]
    assert found.tolist() == [False] * 8 + [True] * 2
    found = create_mask(bias, None, 1, 10, 10, 6, LOWEST, block_size=2)
    assert not found.triu(1).any() and found.any(-1)[0, 0, 1:].all()


def test_what_does_not_fit_is_named():
    bias = torch.randn(1, 1, 4, 6)
    for change, words in (
        ({"attention_bias": bias[..., :5]}, "attention_bias must have shape"),
        ({"window_size": 0}, "window_size must be at least 1"),
        ({"block_size": -2}, "block_size must be at least 1"),
        ({"attention_mask": torch.ones(1, 5)}, "attention_mask must have shape"),
    ):
        given = {"attention_bias": bias, "attention_mask": None, "window_size": 2, **change}
        with pytest.raises(ValueError, match=words):
            create_mask(**given, batch_size=1, query_len=4, key_len=6, min_dtype=LOWEST)


def test_a_mask_of_causal_top_keys_goes_back_to_intervals():
    importance = torch.randn(2, 2, 40)
    query, key, value = torch.randn(2, 30, 4, 8), *torch.randn(2, 2, 40, 2, 8)
    mask = create_mask(importance[:, :, None], None, 2, 30, 40, 6, LOWEST)
    visibility = mask_to_visibility(mask)
    assert (visibility.death == NEVER).any() and (visibility.death < 40).any()
    out = interval_attention(query, key, value, importance, visibility)
    torch.testing.assert_close(out, flash_dmattn_func(query, key, value, mask, importance[:, :, None]))
    whole = dynamic_mask_attention(query, key, value, importance, keep_window_size=6)
    torch.testing.assert_close(out, whole)


def test_a_mask_that_is_none_of_intervals_says_which_key():
    mask = torch.ones(1, 2, 5, 5, dtype=torch.bool)
    mask[0, 1, 2, 3] = False
    with pytest.raises(ValueError, match="key 3 of head 1 in batch row 0.*queries 0 and 4 see and query 2 does not"):
        mask_to_visibility(mask)
    unseen = mask_to_visibility(torch.zeros(1, 1, 3, 4))
    assert torch.equal(*unseen)


@pytest.mark.parametrize("window_size", [None, 5, 100])
def test_the_function_that_models_call(window_size):
    module = types.SimpleNamespace(is_causal=True)
    query, key, value = torch.randn(2, 4, 9, 16), *torch.randn(2, 2, 2, 12, 16)
    bias = torch.randn(2, 2, 12)
    padding = torch.rand(2, 12) > 0.2
    out, weights = flash_dynamic_mask_attention_forward(
        module, query, key, value, padding, bias, scaling=0.3, window_size=window_size, softcap=5.0
    )
    assert weights is None
    mask = padding[:, None, None].expand(2, 2, 9, 12)
    if window_size == 5:
        mask = create_mask(bias[:, :, None], padding, 2, 9, 12, 5, LOWEST)
    tensors = (x.transpose(1, 2) for x in (query, key, value))
    expected, _ = definition(*tensors, mask, bias[:, :, None], is_causal=True, softcap=5.0, scale=0.3)
    torch.testing.assert_close(out, expected)
    with pytest.raises(ValueError, match="attention_bias must be a tensor"):
        flash_dynamic_mask_attention_forward(module, query, key, value, None, None, window_size=3)
