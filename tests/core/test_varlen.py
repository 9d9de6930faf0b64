"""Sequences of different lengths in one tensor equal the same sequences one by one."""

import pytest
import torch

from flash_dmattn import (
    flash_dmattn_varlen_func,
    flash_dmattn_varlen_kvpacked_func,
    flash_dmattn_varlen_qkvpacked_func,
)

from .dense_cases import definition

QUERIES, KEYS = (0, 3, 3, 11, 12), (0, 5, 7, 15, 21)
SHAPES = {
    "nothing": (None, None),
    "by-key": ((4, 2, 1, 8), (1, 4, 1, 8)),
    "mask-by-query": ((4, 2, 8, 8), None),
    "bias-by-query": (None, (1, 1, 8, 8)),
    "packed-rows": ((12, 2, 8), (12, 4, 8)),
}


def one_by_one(query, key, value, mask, bias, bounds, **options):
    outs, lses = [], []
    for b in range(len(bounds[0]) - 1):
        rows, columns = (slice(*given[b : b + 2]) for given in bounds)
        sizes = rows.stop - rows.start, columns.stop - columns.start

        def part(tensor, b=b, rows=rows, sizes=sizes):
            if tensor is None:
                return None
            if tensor.dim() == 3:
                return tensor[rows, :, : sizes[1]].transpose(0, 1)[None]
            return tensor[b % len(tensor)][None, :, : sizes[0], : sizes[1]]

        out, lse = definition(
            query[None, rows], key[None, columns], value[None, columns], part(mask), part(bias), **options
        )
        outs.append(out[0])
        lses.append(lse[0])
    return torch.cat(outs), torch.cat(lses, dim=1)


@pytest.mark.parametrize("is_square", [False, True], ids=["cross", "self"])
@pytest.mark.parametrize("is_causal", [False, True], ids=["whole", "causal"])
@pytest.mark.parametrize("kind", SHAPES)
def test_sequences_equal_themselves_one_by_one(kind, is_causal, is_square):
    keys = QUERIES if is_square else KEYS
    query = torch.randn(12, 4, 16, requires_grad=True)
    key, value = (torch.randn(keys[-1], 2, 16, requires_grad=True) for _ in range(2))
    mask_shape, bias_shape = SHAPES[kind]
    mask = None if mask_shape is None else torch.rand(mask_shape) > 0.3
    bias = None if bias_shape is None else torch.randn(bias_shape, requires_grad=True)
    bounds = [torch.tensor(given, dtype=torch.int32) for given in (QUERIES, keys)]
    leaves = [x for x in (query, key, value, bias) if x is not None]
    out, lse, nothing = flash_dmattn_varlen_func(
        query, key, value, mask, bias, *bounds, 8, 8, is_causal=is_causal, return_attn_probs=True
    )
    assert nothing is None and lse.shape == (4, 12)
    expected, expected_lse = one_by_one(query, key, value, mask, bias, (QUERIES, keys), is_causal=is_causal)
    torch.testing.assert_close((out, lse), (expected, expected_lse), atol=1e-5, rtol=1e-4)
    weights = torch.randn_like(out)
    for found, right in zip(
        torch.autograd.grad(out, leaves, weights), torch.autograd.grad(expected, leaves, weights), strict=True
    ):
        torch.testing.assert_close(found, right, atol=1e-5, rtol=1e-4)


def test_packed_variants_and_lengths_that_are_looked_up():
    bounds = torch.tensor(QUERIES, dtype=torch.int32)
    qkv = torch.randn(12, 3, 2, 16)
    expected = flash_dmattn_varlen_func(*qkv.unbind(1), cu_seqlens_q=bounds, is_causal=True)
    assert torch.equal(flash_dmattn_varlen_qkvpacked_func(qkv, None, None, bounds, 8, is_causal=True), expected)
    out = flash_dmattn_varlen_kvpacked_func(
        q=qkv[:, 0], kv=qkv[:, 1:], cu_seqlens_q=bounds, cu_seqlens_k=bounds.long(), is_causal=True
    )
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"block_table": torch.zeros(1, 1)}, "block_table must be None, got a tensor: gather the pages"),
        ({"cu_seqlens_q": None}, "cu_seqlens_q must be a tensor"),
        ({"cu_seqlens_q": torch.tensor([0, 11])}, "cu_seqlens_q must start with 0 and end with 12"),
        ({"cu_seqlens_k": torch.tensor([0, 5, 12])}, "cu_seqlens_k must have as many sequences"),
        ({"max_seqlen_k": 5}, "max_seqlen_k must be at least 12"),
        ({"attn_mask": torch.ones(1, 1, 3, 12)}, r"attn_mask must have shape \(1, 1 or 2, 1 or 12, 1 or 12\)"),
        ({"query": torch.zeros(1, 12, 2, 16)}, r"query must have shape \(total, heads, D\)"),
        ({"dropout_p": 0.5}, "dropout_p must be 0"),
        ({"softcap": -5.0}, "softcap must be 0 .off. or positive"),
        ({"max_seqlen_q": 12.9}, "max_seqlen_q must be None or an integer"),
        ({"attn_mask": [1]}, "attn_mask must be a tensor, got list"),
        ({"attn_mask": torch.ones(1, 1, 1, 12, dtype=torch.int32)}, "attn_mask must be bool or floating point"),
        ({"attn_mask": torch.ones(1, 1, 1, 12, requires_grad=True)}, "attn_mask must not require a gradient"),
        ({"attn_bias": torch.ones(1, 1, 1, 12, dtype=torch.bool)}, "attn_bias must be floating point"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_does_not_fit_is_named(change, words):
    tensor = torch.zeros(12, 2, 16)
    given = {"query": tensor, "key": tensor, "value": tensor, "cu_seqlens_q": torch.tensor([0, 12]), **change}
    with pytest.raises(ValueError, match=words):
        flash_dmattn_varlen_func(**given)
