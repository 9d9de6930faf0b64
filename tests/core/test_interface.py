"""The functions with a mask and a bias: arguments, aliases, packed tensors, what they return and refuse."""

import functools
import logging
import subprocess
import sys

import pytest
import torch

import flash_dmattn
from flash_dmattn import flash_dmattn_func, flash_dmattn_func_auto
from flash_dmattn.dense.functions import reference_dmattn_func

from .dense_cases import definition


@pytest.fixture
def inputs():
    query = torch.randn(2, 9, 4, 16)
    key, value = torch.randn(2, 2, 12, 2, 16)
    return query, key, value, torch.rand(2, 2, 9, 12) > 0.3, torch.randn(1, 4, 9, 12)


def expected(query, key, value, mask=None, bias=None, **options):
    out, lse = definition(*(x.double() for x in (query, key, value)), mask, bias, **options)
    return out.float(), lse.float()


def test_arguments_stand_in_the_order_that_code_relies_on(inputs):
    out, lse, nothing = flash_dmattn_func(*inputs, 0.3, True, 2.0, True, True)
    assert nothing is None
    torch.testing.assert_close((out, lse), expected(*inputs, scale=0.3, is_causal=True, softcap=2.0))


def test_defaults_are_a_scale_by_the_head_dim_not_causal_and_no_softcap(inputs):
    query, key, value, *_ = inputs
    torch.testing.assert_close(flash_dmattn_func(query, key, value), expected(query, key, value)[0])


def test_aliases(inputs):
    query, key, value, *_ = inputs
    out = flash_dmattn_func(q=query, k=key, v=value, softmax_scale=0.3, is_causal=True)
    torch.testing.assert_close(out, flash_dmattn_func(query, key, value, scale=0.3, is_causal=True))
    for given in ({"q": query}, {"scale": 1.0, "softmax_scale": 1.0}):
        with pytest.raises(TypeError, match="alias"):
            flash_dmattn_func(query, key, value, **given)


def test_a_window_has_two_names(inputs):
    query, key, value, *_ = inputs
    importance = torch.randn(2, 2, 12)
    expected = flash_dmattn.dynamic_mask_attention(query, key, value, importance, keep_window_size=3)
    out = flash_dmattn.dynamic_mask_attention(query, key, value, importance, window_size=3)
    assert torch.equal(out, expected)
    with pytest.raises(TypeError, match="window_size"):
        flash_dmattn.select_visible(importance, window_size=3, keep_window_size=3)


def test_packed_tensors_give_the_same_and_take_gradients(inputs):
    query, key, value, mask, bias = inputs
    kv = torch.stack([key, value], dim=2).requires_grad_()
    out = flash_dmattn.flash_dmattn_kvpacked_func(query, kv, mask, bias, None, True)
    torch.testing.assert_close(out, expected(*inputs, is_causal=True)[0])
    out.sum().backward()
    assert kv.grad.abs().sum() > 0
    qkv = torch.randn(2, 9, 3, 2, 16, requires_grad=True)
    out, lse, _ = flash_dmattn.flash_dmattn_qkvpacked_func(qkv, None, None, True, 0.3, return_attn_probs=True)
    torch.testing.assert_close((out, lse), expected(*qkv.unbind(2), scale=0.3, is_causal=True))


def test_functions_of_one_backend(inputs):
    query, key, value, mask, bias = inputs
    causal, whole = (expected(*inputs, is_causal=is_causal)[0] for is_causal in (True, False))
    torch.testing.assert_close(reference_dmattn_func(*inputs), whole)
    torch.testing.assert_close(flash_dmattn.flex_dmattn_func(*inputs), causal)
    torch.testing.assert_close(flash_dmattn.flex_dmattn_func(*inputs, is_causal=False), whole)


def test_auto_returns_the_function_of_a_backend(monkeypatch):
    assert flash_dmattn_func_auto() is flash_dmattn_func
    assert flash_dmattn_func_auto("reference") is reference_dmattn_func
    bound = flash_dmattn_func_auto("reference", is_causal=True)
    assert isinstance(bound, functools.partial) and bound.keywords == {"is_causal": True}
    with pytest.raises(ValueError, match="'numpy'"):
        flash_dmattn_func_auto("numpy")
    monkeypatch.setattr("flash_dmattn.dense.functions.explain_backends", lambda: {"triton": "it is not installed"})
    with pytest.raises(RuntimeError, match="'triton' is not available: it is not installed"):
        flash_dmattn_func_auto("triton")


def test_the_gpu_function_serves_a_cpu_and_says_so(monkeypatch, caplog, inputs):
    from flash_dmattn import dispatch
    from flash_dmattn.dense import functions

    dispatch._announce.cache_clear()
    monkeypatch.setattr(functions, "explain_backends", lambda: {"triton": "no GPU"})
    with caplog.at_level(logging.INFO, "flash_dmattn"):
        for _ in range(2):
            function = flash_dmattn_func_auto(backend="cuda")
    said = [record.message for record in caplog.records if "reference backend" in record.message]
    assert len(said) == 1 and said[0].endswith("no GPU)")
    torch.testing.assert_close(function(*inputs), expected(*inputs)[0])


def test_availability_is_known_by_name():
    assert flash_dmattn.CUDA_AVAILABLE is torch.cuda.is_available()
    assert flash_dmattn.FLEX_AVAILABLE is ("flex" in flash_dmattn.get_available_backends())
    assert flash_dmattn.TRITON_AVAILABLE is ("triton" in flash_dmattn.get_available_backends())
    with pytest.raises(AttributeError, match="ROCM_AVAILABLE"):
        _ = flash_dmattn.ROCM_AVAILABLE


def test_a_bias_gets_its_gradient_in_its_own_shape(inputs):
    query, key, value = (x.double() for x in inputs[:3])  # a bias for all keys has a gradient of 0: sums that cancel
    mask = inputs[3]
    for shape in ((1, 1, 9, 12), (2, 2, 1, 12), (1, 4, 1, 1)):
        bias = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        flash_dmattn_func(query, key, value, mask, bias).square().sum().backward()
        found, bias.grad = bias.grad, None
        out, _ = definition(query, key, value, mask, bias)
        out.square().sum().backward()
        torch.testing.assert_close(found, bias.grad)


@pytest.mark.parametrize("is_per_key", [False, True], ids=["dense", "per-key"])
def test_a_query_that_sees_nothing_gives_zero(is_per_key):
    query = torch.randn(1, 5, 1, 8, requires_grad=True)
    mask = torch.zeros(1, 1, 1 if is_per_key else 5, 5)
    mask[..., -1:, 3:] = 1.0
    if is_per_key:
        mask[..., 3] = 0.0
    out, lse, _ = flash_dmattn_func(query, query, query, mask, is_causal=True, return_attn_probs=True)
    assert (out[0, :4] == 0).all() and lse[0, 0, :4].isneginf().all() and (out[0, 4] != 0).all()
    (grad,) = torch.autograd.grad(out.sum() + lse[..., 4:].sum(), query)
    assert grad.isfinite().all() and (grad[0, :3] == 0).all()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"attn_mask": torch.ones(2, 3, 9, 12)}, r"attn_mask must have shape \(1 or 2, 1 or 2 or 4, 1 or 9, 1 or 12\)"),
        ({"attn_mask": torch.ones(9, 12)}, r"attn_mask must have shape .*, got \(9, 12\)"),
        ({"attn_mask": torch.ones(1, 1, 9, 12, dtype=torch.int32)}, "attn_mask must be bool or floating point"),
        ({"attn_mask": torch.ones(1, 1, 9, 12, requires_grad=True)}, "attn_mask must not require a gradient"),
        ({"attn_bias": torch.ones(1, 1, 9, 12, dtype=torch.bool)}, "attn_bias must be floating point"),
        ({"attn_bias": [0.0]}, "attn_bias must be a tensor, got list"),
        ({"value": torch.zeros(2, 12, 2, 8)}, "value must have key's shape"),
        ({"softcap": -1.0}, "softcap must be 0"),
        ({"dropout_p": 0.1}, "dropout_p must be 0, got 0.1.*scaled_dot_product_attention"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_does_not_fit_is_named(change, words, inputs):
    query, key, value, *_ = inputs
    with pytest.raises(ValueError, match=words):
        flash_dmattn_func(**{"query": query, "key": key, "value": value, **change})
    with pytest.raises(ValueError, match=r"kv must have shape \(B, S, 2, heads, D\)"):
        flash_dmattn.flash_dmattn_kvpacked_func(query, key)


def test_the_deprecated_extension_says_what_became_of_it():
    code = "import warnings; warnings.simplefilter('error'); import flash_dma_cuda"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "DeprecationWarning: flash_dma_cuda is deprecated" in run.stderr
    with pytest.warns(DeprecationWarning):
        sys.modules.pop("flash_dma_cuda", None)
        import flash_dma_cuda
    assert flash_dma_cuda.is_available is (flash_dma_cuda.why_unavailable is None)
    assert (flash_dma_cuda.path is not None) is flash_dma_cuda.is_available
