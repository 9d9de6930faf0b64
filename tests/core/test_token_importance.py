"""The importance of single tokens in one launch equals the same in torch operations."""

import importlib.util
import os

import pytest
import torch
import torch.nn.functional as F

from flash_dmattn.token_importance import can_fuse, token_importance_op

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None
    or (DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET", "0") in ("", "0")),
    reason="Triton is not installed, or neither a GPU nor its interpreter is used",
)


@needs_triton
@pytest.mark.parametrize("max_exponent", [None, 80.0])
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize(("num_kv_heads", "head_dim", "num_heads"), [(2, 20, 4), (3, 64, 3), (9, 128, 1)])
def test_it_equals_torch(num_kv_heads, head_dim, num_heads, has_bias, max_exponent):
    from flash_dmattn.backends.triton.importance_kernel import run_importance

    value = torch.randn(2, 1, num_kv_heads, head_dim, device=DEVICE).transpose(1, 2)
    weight = torch.randn(num_heads, num_kv_heads * head_dim, device=DEVICE)
    bias = 10 * torch.randn(num_heads, device=DEVICE) if has_bias else None
    A = torch.randn(num_heads, device=DEVICE)
    dt = F.linear(value.transpose(1, 2).reshape(2, 1, -1), weight, bias).transpose(1, 2)
    expected = A[:, None] * F.softplus(dt)
    if max_exponent is not None:
        expected = expected.clamp(max=max_exponent).exp()
    found = run_importance(value, weight, bias, A, max_exponent)
    torch.testing.assert_close(found, expected, rtol=2e-4, atol=1e-30)


@needs_triton
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("max_exponent", [None, 80.0])
def test_it_ends_in_the_bits_of_torch_in_float64(max_exponent, dtype):
    """Tokens of a prompt, whose importance torch computes, and decoded ones tie."""
    from flash_dmattn.backends.triton.importance_kernel import run_importance

    value = torch.randn(200, 3, 1, 64, device=DEVICE).to(dtype)
    weight, bias, A = (torch.randn(shape, device=DEVICE) for shape in ((2, 192), (2,), (2,)))
    dt = F.linear(value.double().transpose(1, 2).flatten(2), weight.double(), bias.double()).transpose(1, 2)
    expected = A.double()[:, None] * F.softplus(dt)
    if max_exponent is not None:
        expected = expected.clamp(max=max_exponent).exp()
    assert torch.equal(run_importance(value, weight, bias, A, max_exponent), expected.float())


@needs_triton
def test_small_importances_stay_apart():
    """softplus of what is far below zero is exp of it, not zero: otherwise such keys would tie."""
    from flash_dmattn.backends.triton.importance_kernel import run_importance

    value = -torch.arange(1.0, 9.0, device=DEVICE).view(8, 1, 1, 1).expand(8, 1, 1, 16) * 4
    weight, A = torch.full((1, 16), 1 / 16, device=DEVICE), torch.ones(1, device=DEVICE)
    found = run_importance(value, weight, None, A, None).flatten()
    torch.testing.assert_close(found, F.softplus(-4 * torch.arange(1.0, 9.0, device=DEVICE)), rtol=1e-5, atol=0)


def test_it_is_left_out_off_a_gpu():
    value, weight, A = torch.zeros(1, 2, 1, 8), torch.zeros(2, 16), torch.zeros(2)
    assert not can_fuse(value, weight, None, A)


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA GPU")
def test_it_is_left_out_where_gradients_or_several_tokens_are_wanted():
    value, weight, A = (torch.zeros(shape, device="cuda") for shape in ((1, 2, 1, 8), (2, 16), (2,)))
    assert can_fuse(value, weight, None, A)
    assert not can_fuse(value.requires_grad_(), weight, None, A)
    with torch.no_grad():
        assert can_fuse(value, weight, None, A)
    assert not can_fuse(torch.zeros(1, 2, 2, 8, device="cuda"), weight, None, A)
    assert not can_fuse(value.detach().double(), weight, None, A)


@needs_triton
@pytest.mark.parametrize("has_bias", [True, False])
def test_the_operator_is_what_the_compiler_expects(has_bias):
    value, weight, A = (torch.randn(shape, device=DEVICE) for shape in ((2, 2, 1, 8), (3, 16), (3,)))
    call = (value, weight, A.clone() if has_bias else None, A, None)
    torch.library.opcheck(token_importance_op, call, test_utils=("test_schema", "test_faketensor"))
