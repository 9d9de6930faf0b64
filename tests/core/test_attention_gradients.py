"""Gradients of out and lse equal those that autograd finds for the definition in float64, each input by itself."""

import math

import pytest
import torch

from flash_dmattn import Visibility, dynamic_mask_attention, interval_attention, select_visible

from . import definition
from .attention_cases import CASES, TOLERANCES, AttentionCase, assert_close, documents, padding, window

NAMES = ["query", "key", "value", "importance"]


def gradients(function, inputs, dout, dlse, **options):
    """Gradients of sum(out * dout) + sum(lse * dlse); a part is left out when its weight is None."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    out, lse = function(*leaves, **options)
    total = 0
    if dout is not None:
        total = total + (out * dout.to(out.dtype)).sum()
    if dlse is not None:
        total = total + torch.where(lse.isfinite(), lse, 0).mul(dlse.to(lse.dtype)).sum()
    return torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True)


PARTS = {"of-out": (True, False), "of-lse": (False, True), "of-both": (True, True)}
GRADIENT_CASES = [case for case in CASES if case.seqlen_q]


@pytest.mark.parametrize(
    ("case", "parts"),
    [(CASES[0], "of-lse"), *((case, parts) for case in GRADIENT_CASES for parts in ("of-out", "of-both"))],
    ids=str,
)
def test_gradients_equal_those_of_the_definition(case, parts):
    inputs = case.inputs()
    has_out, has_lse = PARTS[parts]
    dout = torch.randn(*inputs[0].shape[:3], inputs[2].shape[3]).to(case.dtype) if has_out else None
    dlse = torch.randn(case.batch, case.num_heads, case.seqlen_q) if has_lse else None
    got = gradients(dynamic_mask_attention, inputs, dout, dlse, **case.options, return_lse=True)
    options = {name: x for name, x in case.options.items() if name != "max_seqlen"}
    doubles = [x.double() for x in inputs[:3]] + inputs[3:]  # the importance keeps its ties
    expected = gradients(definition.dynamic_mask_attention, doubles, dout, dlse, **options)
    for name, x, mine, right in zip(NAMES, inputs, got, expected, strict=True):
        assert mine.dtype == x.dtype
        if name == "importance":  # the clamped ones have no defined slope
            mine, right = (grad.masked_fill(x == math.inf, 0) for grad in (mine, right))
            assert (mine[~(x > -math.inf)] == 0).all(), "a key of importance -inf has a gradient"
        dtype = max(case.dtype, x.dtype, key=TOLERANCES.get)
        assert_close(f"d{name}", mine, right.double(), dtype)


def test_gradcheck_of_dynamic_mask_attention():
    case = AttentionCase("gradcheck", 1, 6, 9, 4, 2, head_dim=3, dtype=torch.float64, importance_dtype=torch.float64)
    inputs = [x.requires_grad_() for x in case.inputs()]
    inputs[3].data = torch.randperm(18).view(1, 2, 9).double() / 9  # no two so close that a step changes the ranks

    def both(*tensors):
        out, lse = dynamic_mask_attention(*tensors, **window(4, 1, 1, softcap=3.0), return_lse=True)
        return out, lse

    assert torch.autograd.gradcheck(both, inputs)


@pytest.mark.parametrize("num_lanes", [1, 4])
def test_gradcheck_of_interval_attention(num_lanes):
    query, key, value = torch.randn(1, 5, 4, 3), *torch.randn(2, 1, 8, 1, 3)
    inputs = [x.double().requires_grad_() for x in (query, key, value, torch.randn(1, num_lanes, 8))]
    birth = torch.randint(0, 5, (1, num_lanes, 8), dtype=torch.int32)
    birth[..., 0] = 0  # every query sees a key: a finite difference of -inf is not a number
    visibility = Visibility(birth, birth + torch.randint(1, 5, birth.shape, dtype=torch.int32))
    visibility.death[..., 0] = definition.NEVER
    assert torch.autograd.gradcheck(
        lambda *x: interval_attention(*x, visibility, query_start=0, return_lse=True), inputs
    )


def test_a_sum_gives_the_gradient_of_ones():
    case = AttentionCase("sum")
    inputs = case.inputs()
    ones = torch.ones_like(inputs[0])
    expected = gradients(dynamic_mask_attention, inputs, ones, None, **case.options, return_lse=True)
    leaves = [x.requires_grad_() for x in inputs]
    dynamic_mask_attention(*leaves, **case.options).sum().backward()  # dout has strides of zero
    for leaf, right in zip(leaves, expected, strict=True):
        torch.testing.assert_close(leaf.grad, right)


@pytest.mark.parametrize("wanted", range(4), ids=NAMES)
def test_one_input_alone_may_ask_for_a_gradient(wanted):
    case = AttentionCase("alone")
    inputs = case.inputs()
    dout = torch.randn_like(inputs[0])
    expected = gradients(dynamic_mask_attention, inputs, dout, None, **case.options, return_lse=True)[wanted]
    inputs[wanted].requires_grad_()
    dynamic_mask_attention(*inputs, **case.options).backward(dout)
    torch.testing.assert_close(inputs[wanted].grad, expected)
    assert all(x.grad is None for index, x in enumerate(inputs) if index != wanted)


def test_without_the_bias_the_importance_gets_exactly_no_gradient():
    case = AttentionCase("no-bias", options=window(7, add_importance_bias=False))
    inputs = case.inputs()
    dlse = torch.randn(2, 3, 23)
    found = gradients(dynamic_mask_attention, inputs, inputs[0], dlse, **case.options, return_lse=True)
    assert (found[3] == 0).all() and all((grad != 0).any() for grad in found[:3])


@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf, 1e30], ids=str)
@pytest.mark.parametrize("layout", ["padded", "packed-and-padded"])
def test_garbage_in_padded_rows_changes_no_gradient(layout, garbage):
    rows = ["0011111101111", "1110000101110"] if layout == "padded" else ["0011111101110"]
    mask = padding(*rows)
    options = window(4, 1, 1, padding_mask=mask)
    if layout == "packed-and-padded":
        options["cu_seqlens"] = documents(6, 7)
    case = AttentionCase("garbage", len(rows), 13, 13, 4, 2, options=options)
    inputs = case.inputs()
    dout, dlse = torch.randn_like(inputs[0]), torch.randn(len(rows), 4, 13)
    clean = gradients(dynamic_mask_attention, inputs, dout, dlse, **options, return_lse=True)
    unreal = ~mask
    dirty_inputs = [x.masked_fill(unreal[:, :, None, None], garbage) for x in inputs[:3]]
    dirty_inputs.append(inputs[3].masked_fill(unreal[:, None], garbage))
    dirty = gradients(dynamic_mask_attention, dirty_inputs, dout, dlse, **options, return_lse=True)
    for name, mine, right in zip(NAMES, dirty, clean, strict=True):
        assert torch.equal(mine, right), name
        padded = mine.transpose(1, 2)[unreal] if name == "importance" else mine[unreal]
        assert (padded == 0).all(), name


def test_garbage_in_a_key_that_nobody_sees_changes_no_gradient():
    case = AttentionCase("unseen", num_heads=2, options={})
    query, key, value, importance = case.inputs()
    visibility = select_visible(importance, keep_window_size=3)
    for empty in (3, 12):
        visibility.death[..., empty] = visibility.birth[..., empty]
    dout = torch.randn_like(query)
    found = []
    for garbage in (0.0, math.nan, math.inf):
        for x in (key, value):
            x[:, [3, 12]] = garbage
        importance[..., [3, 12]] = garbage
        found.append(
            gradients(
                interval_attention,
                (query, key, value, importance),
                dout,
                None,
                visibility=visibility,
                return_lse=True,
            )
        )
    for dirty in found[1:]:
        for name, mine, right in zip(NAMES, dirty, found[0], strict=True):
            assert torch.equal(mine, right), name


def test_deterministic_gradients_are_bitwise_equal():
    case = AttentionCase("deterministic", seqlen_q=200, seqlen_k=200, num_heads=4, num_kv_heads=2)
    inputs = case.inputs()
    options = window(50, 2, 10, deterministic=True, return_lse=True)
    first, second = (
        gradients(dynamic_mask_attention, inputs, torch.ones_like(inputs[0]), None, **options) for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("size", [1e4, 1e7, 1e9, math.exp(80), math.inf], ids=str)
def test_equal_keys_share_the_weight_however_large_their_importance(size):
    key, value = torch.zeros(1, 4, 1, 8), torch.randn(1, 4, 1, 8, requires_grad=True)
    out = dynamic_mask_attention(torch.randn(1, 1, 1, 8), key, value, torch.full((1, 1, 4), size), keep_window_size=4)
    out.sum().backward()
    torch.testing.assert_close(out[0, 0], value[0].mean(0))
    torch.testing.assert_close(value.grad, torch.full_like(value, 0.25))
