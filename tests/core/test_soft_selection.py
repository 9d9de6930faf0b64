"""Soft selection against its definition: forward and gradients, its limit, and what is refused."""

import math
import random

import pytest
import torch
import torch.utils.checkpoint
from conftest import SEED

import flash_dmattn
from flash_dmattn import dynamic_mask_attention, select_visible
from flash_dmattn.backends import triton
from flash_dmattn.soft_selection import cut_softly, num_visible
from tests.core import soft_definition

HAS_GPU = torch.cuda.is_available()
NAMES = ("out", "lse", "dquery", "dkey", "dvalue", "dimportance")


def random_problem(number, dtype):
    """Returns tensors and options of a random call, as the functions under test and the definition take them."""
    rng = random.Random(SEED + number)
    generator = torch.Generator().manual_seed(SEED + number)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    kind = rng.choice(["plain", "padded", "packed"])
    seqlen_k = rng.choice([1, 5, 17, 40])
    batch = 1 if kind == "packed" else rng.choice([1, 2])
    num_kv_heads = rng.choice([1, 2])
    importance_heads = rng.choice([1, num_kv_heads, 4])
    seqlen_q = seqlen_k if kind == "packed" else rng.choice([seqlen_k, max(1, seqlen_k // 2)])
    sinks, local = rng.choice([0, 2]), rng.choice([0, 1, 5])
    options = {
        "keep_window_size": max(1, sinks + local + rng.choice([0, 1, 3, 8])),
        "num_sink_tokens": sinks,
        "local_window_size": local,
        "padding_mask": None,
        "cu_seqlens": None,
        "sliding_window": rng.choice([None, 9]),
        "softcap": rng.choice([0.0, 2.0]),
        "add_importance_bias": rng.choice([True, False]),
    }
    if kind == "padded":
        options["padding_mask"] = torch.rand(batch, seqlen_k, generator=generator) > 0.3
    if kind == "packed":
        cuts = sorted(rng.randrange(seqlen_k + 1) for _ in range(3))
        options["cu_seqlens"] = torch.tensor([0, *cuts, seqlen_k], dtype=torch.int32)
    importance = draw(batch, importance_heads, seqlen_k)
    if rng.random() < 0.3:
        importance[..., rng.randrange(seqlen_k)] = rng.choice([-math.inf, math.nan])
    if rng.random() < 0.3:  # ties
        importance = (2 * importance).round() / 2
    tensors = (
        draw(batch, seqlen_q, 4, 16),
        draw(batch, seqlen_k, num_kv_heads, 16),
        draw(batch, seqlen_k, num_kv_heads, 16),
        importance,
    )
    return tensors, options, rng.choice([0.1, 1.0]), rng.choice([1.0, 1.5, None])


def results(attend, tensors, dtype):
    """Returns out, lse and the gradients of a random sum of both, by name."""
    inputs = [tensor.clone().requires_grad_() for tensor in tensors]
    out, lse = attend(*inputs)
    generator = torch.Generator().manual_seed(SEED)
    dout = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(dtype).to(out.device)
    dlse = torch.randn(lse.shape, generator=generator, dtype=torch.float64).to(out.device)
    total = (out * dout).sum() + torch.where(lse.isfinite(), lse * dlse, 0).sum()
    gradients = torch.autograd.grad(total, inputs, allow_unused=True)
    gradients = [torch.zeros_like(x) if g is None else g for x, g in zip(inputs, gradients, strict=True)]
    return dict(zip(NAMES, (out.detach(), lse.detach(), *gradients), strict=True))


def check(number, dtype, backend, tolerance, device="cpu"):
    tensors, options, temperature, band = random_problem(number, dtype)
    expected = results(
        lambda *inputs: soft_definition.attention(*inputs, temperature, band, **options), tensors, torch.float64
    )
    moved = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    got = results(
        lambda *inputs: dynamic_mask_attention(
            *inputs, selection_temperature=temperature, selection_band=band, return_lse=True, backend=backend, **moved
        ),
        [tensor.to(device) for tensor in tensors],
        dtype,
    )
    is_finite = tensors[3].isfinite()
    expected["dimportance"] = torch.where(is_finite, expected["dimportance"], 0)
    got["dimportance"] = torch.where(is_finite.to(device), got["dimportance"], 0)
    got = {name: tensor.cpu().double() for name, tensor in got.items()}
    expected = {name: tensor.double() for name, tensor in expected.items()}
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("number", range(150))
def test_the_reference_equals_the_definition(number):
    check(number, torch.float64, "reference", 1e-8)


@pytest.mark.skipif(triton.why_unavailable() is not None, reason=f"{triton.why_unavailable()}")
@pytest.mark.parametrize("number", range(12 if not HAS_GPU else 150))
def test_triton_equals_the_definition(number):
    check(number, torch.float32, "triton", 2e-3, "cuda" if HAS_GPU else "cpu")


def problem(seqlen=60, heads=2):
    tensors = [torch.randn(1, seqlen, n, 8, dtype=torch.float64) for n in (2 * heads, heads, heads)]
    return [*tensors, torch.randn(1, heads, seqlen, dtype=torch.float64)]


WINDOWS = {"keep_window_size": 16, "num_sink_tokens": 2, "local_window_size": 5}
FEW = {"keep_window_size": 9, "num_sink_tokens": 1, "local_window_size": 3}


@pytest.mark.parametrize("add_importance_bias", [True, False])
@pytest.mark.parametrize("band", [1.0, 1.5, None])
def test_no_temperature_is_the_limit_of_low_ones(add_importance_bias, band):
    tensors = problem()
    hard = dynamic_mask_attention(*tensors, add_importance_bias=add_importance_bias, **WINDOWS)
    soft = dynamic_mask_attention(
        *tensors,
        add_importance_bias=add_importance_bias,
        selection_temperature=1e-7,
        selection_band=band,
        **WINDOWS,
    )
    torch.testing.assert_close(soft, hard, rtol=1e-9, atol=1e-9)


def test_a_temperature_changes_the_result():
    tensors = problem()
    hard = dynamic_mask_attention(*tensors, **WINDOWS)
    soft = dynamic_mask_attention(*tensors, selection_temperature=1.0, **WINDOWS)
    assert not torch.allclose(soft, hard, atol=1e-3)


def test_nothing_is_gated_up_to_the_window():
    tensors = problem(seqlen=16)
    hard = dynamic_mask_attention(*tensors, **WINDOWS)
    assert torch.equal(dynamic_mask_attention(*tensors, selection_temperature=1.0, **WINDOWS), hard)


def test_gradcheck_of_the_gate():
    query, key, value, importance = (tensor[:, :20] if tensor.dim() == 4 else tensor[..., :20] for tensor in problem())
    cut = cut_softly(importance, select_visible(importance, **FEW).death, 0.7, 20, **FEW)
    is_gated = cut.threshold.isfinite()
    assert is_gated.any() and not is_gated.all()

    def attend(query, key, value, score, threshold):
        threshold = torch.where(is_gated, threshold, -math.inf)
        soft = flash_dmattn.SoftCut(score, threshold, cut.contested_from)
        return flash_dmattn.interval_attention(query, key, value, None, None, soft=soft)

    inputs = (query, key, value, cut.score, torch.where(is_gated, cut.threshold, 0))
    assert torch.autograd.gradcheck(attend, [tensor.requires_grad_() for tensor in inputs])


def test_the_gradient_of_a_threshold_goes_to_the_two_keys_that_set_it():
    importance = torch.randn(1, 1, 20, dtype=torch.float64)
    attached = importance.clone().requires_grad_()
    analytic = torch.autograd.grad(
        cut_softly(attached, select_visible(attached, **FEW).death, 0.7, 20, **FEW).threshold[..., -1], attached
    )[0]
    assert (analytic != 0).sum() == 2
    assert math.isclose(analytic.sum().item(), 1 / (0.7 * importance.std(correction=0).item()), rel_tol=1e-9)


def test_a_key_beyond_the_cut_gets_a_gradient():
    query, key, value, importance = problem()
    importance.requires_grad_()
    for temperature, expected in ((None, False), (1.0, True)):
        out = dynamic_mask_attention(
            query, key, value, importance, add_importance_bias=False, selection_temperature=temperature, **WINDOWS
        )
        assert out.requires_grad == expected
    gradient = torch.autograd.grad(out[:, -1].sum(), importance)[0]
    last = flash_dmattn.select_visible(importance, **WINDOWS).death <= 59
    assert (gradient[last] != 0).any()


def test_checkpointing_changes_no_gradient():
    importance = torch.randn(1, 2, 60, dtype=torch.float64)
    query, key, value = (torch.randn(1, 60, 2, 8, dtype=torch.float64) for _ in range(3))

    def attend(importance):
        options = {"keep_window_size": 12, "num_sink_tokens": 1, "local_window_size": 3}
        return dynamic_mask_attention(query, key, value, importance, selection_temperature=0.5, **options)

    gradients = []
    for run in (attend, lambda tensor: torch.utils.checkpoint.checkpoint(attend, tensor, use_reentrant=False)):
        leaf = importance.clone().requires_grad_()
        run(leaf).square().sum().backward()
        gradients.append(leaf.grad)
    assert torch.equal(*gradients) and gradients[0].any()


def test_the_temperature_may_be_a_tensor():
    tensors = problem()
    expected = dynamic_mask_attention(*tensors, selection_temperature=0.3, **WINDOWS)
    got = dynamic_mask_attention(*tensors, selection_temperature=torch.tensor(0.3, dtype=torch.float64), **WINDOWS)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("temperature", [0, -1.0, math.inf, math.nan])
def test_temperatures_that_are_none_are_refused(temperature):
    with pytest.raises(ValueError, match="selection_temperature must be None or above 0"):
        dynamic_mask_attention(*problem(), selection_temperature=temperature, **WINDOWS)


def test_other_bad_input_is_refused():
    with pytest.raises(ValueError, match="selection_band must be None or at least 1, got 0.5"):
        dynamic_mask_attention(*problem(), selection_temperature=1.0, selection_band=0.5, **WINDOWS)
    with pytest.raises(ValueError, match="selection_temperature needs is_causal=True"):
        dynamic_mask_attention(*problem(), selection_temperature=1.0, is_causal=False, keep_window_size=8)
    with pytest.raises(RuntimeError, match="it has no soft selection"):
        dynamic_mask_attention(*problem(), selection_temperature=1.0, backend="flex", **WINDOWS)
    query, key, value, importance = problem()
    cut = flash_dmattn.SoftCut(importance, importance[..., :5], torch.zeros(1, 2, 60, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"soft.threshold must have shape \(1, 2, 60\), got \(1, 2, 5\)"):
        flash_dmattn.interval_attention(query, key, value, importance, None, soft=cut)


def test_the_band_counts_whole_keys():
    assert num_visible(110, 0, 10, 1.1) == 10 + 110
    assert num_visible(20, 2, 8, 1.25) == 10 + 13
    assert num_visible(10, 2, 8, 1.5) == 10
