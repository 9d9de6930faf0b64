"""The cross-entropy in chunks and its gradients are those of the whole logits."""

import pytest
import torch
import torch.nn.functional as F

from flash_dmattn_hf.training.chunked_cross_entropy import chunked_cross_entropy

OPERATIONS = {
    "none": ("", lambda logits: logits),
    "float32": ("float32", lambda logits: logits.float()),
    "softcap": ("/3.0,tanh,*3.0", lambda logits: torch.tanh(logits / 3.0) * 3.0),
    "scale": ("*0.5", lambda logits: logits * 0.5),
}


def make_inputs(dtype, *, bias=True, count=29, vocabulary=37, ignored=(3, 4, 28)):
    generator = torch.Generator().manual_seed(0)
    shapes = ((count, 16), (vocabulary, 16), (vocabulary,))
    hidden, weight, offset = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in shapes)
    tensors = [tensor.to(dtype).requires_grad_() for tensor in (hidden, weight, offset)]
    labels = torch.randint(0, vocabulary, (count,), generator=generator)
    labels[list(ignored)] = -100
    return tensors[0], tensors[1], tensors[2] if bias else None, labels


def loss_and_gradients(loss, tensors, scale=0.25):
    (loss * scale).backward()
    return [loss.detach(), *(tensor.grad for tensor in tensors if tensor is not None)]


@pytest.mark.parametrize("chunk_size", [1, 7, 29, 100, None])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("operations", ["none", "softcap", "scale"])
def test_it_equals_the_whole_logits_in_float64(operations, bias, chunk_size):
    names, function = OPERATIONS[operations]
    *tensors, labels = make_inputs(torch.float64, bias=bias)
    loss = chunked_cross_entropy(tensors[0], tensors[1], labels, tensors[2], operations=names, chunk_size=chunk_size)
    got = loss_and_gradients(loss, tensors)
    *tensors, labels = make_inputs(torch.float64, bias=bias)
    logits = function(F.linear(*tensors))
    expected = loss_and_gradients(F.cross_entropy(logits, labels, reduction="sum"), tensors)
    torch.testing.assert_close(got, expected, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("operations", OPERATIONS)
def test_its_error_is_that_of_the_whole_logits_in_low_precision(operations, dtype):
    names, function = OPERATIONS[operations]
    *tensors, labels = make_inputs(dtype)
    exact = [tensor.detach().double().requires_grad_() for tensor in tensors]
    exact_loss = F.cross_entropy(OPERATIONS[operations][1](F.linear(*exact)).double(), labels, reduction="sum")
    expected = loss_and_gradients(exact_loss, exact)
    got = loss_and_gradients(
        chunked_cross_entropy(tensors[0], tensors[1], labels, tensors[2], operations=names, chunk_size=7), tensors
    )
    *tensors, labels = make_inputs(dtype)
    plain = F.cross_entropy(function(F.linear(*tensors)).float(), labels, reduction="sum")
    plain = loss_and_gradients(plain, tensors)
    for ours, theirs, truth in zip(got, plain, expected, strict=True):
        error, allowed = ((each.double() - truth).norm() / truth.norm() for each in (ours, theirs))
        assert error <= 1.5 * allowed + torch.finfo(dtype).eps, (error, allowed)


def test_the_loss_is_in_float32_and_gradients_in_the_dtype_of_training():
    *tensors, labels = make_inputs(torch.bfloat16)
    loss, *gradients = loss_and_gradients(chunked_cross_entropy(tensors[0], tensors[1], labels, tensors[2]), tensors)
    assert loss.dtype == torch.float32 and {gradient.dtype for gradient in gradients} == {torch.bfloat16}


def test_weight_gradients_add_up_in_float32():
    """1024 equal contributions: added in bfloat16 the sum would stand still at 256 of them."""
    hidden = torch.ones(1024, 1, dtype=torch.bfloat16)
    weight = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    chunked_cross_entropy(hidden, weight, torch.zeros(1024, dtype=torch.long), chunk_size=1).backward()
    assert weight.grad.tolist() == [[-512.0], [512.0]]


def test_tokens_without_a_label_count_for_nothing_whatever_they_hold():
    hidden, weight, bias, labels = make_inputs(torch.float64)
    expected = loss_and_gradients(
        chunked_cross_entropy(hidden, weight, labels, bias, chunk_size=7), (hidden, weight, bias)
    )
    spoilt, weight, bias, labels = make_inputs(torch.float64)
    with torch.no_grad():
        spoilt[labels == -100] = torch.nan
    got = loss_and_gradients(chunked_cross_entropy(spoilt, weight, labels, bias, chunk_size=7), (spoilt, weight, bias))
    torch.testing.assert_close(got, expected, atol=0, rtol=0)


def test_only_what_learns_gets_a_gradient():
    hidden, weight, bias, labels = make_inputs(torch.float32)
    chunked_cross_entropy(hidden, weight.detach(), labels, bias.detach()).backward()
    assert hidden.grad is not None and weight.grad is None and bias.grad is None
    with torch.no_grad():
        assert not chunked_cross_entropy(hidden, weight, labels, bias).requires_grad


def test_the_operator_passes_torchs_own_checks():
    *tensors, labels = make_inputs(torch.float64)
    torch.library.opcheck(
        torch.ops.flash_dmattn_hf.chunked_cross_entropy.default,
        (*tensors, labels, "/3.0,tanh,*3.0", -100, 7, True, True, True),
        test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight": torch.zeros(5, 3)}, "hidden and weight must have shapes"),
        ({"labels": torch.zeros(3, dtype=torch.long)}, r"labels must have shape \(29,\), got \(3,\)"),
        ({"bias": torch.zeros(3)}, r"bias must have shape \(37,\), got \(3,\)"),
        ({"weight": torch.zeros(37, 16, dtype=torch.float64)}, "weight must have the dtype of hidden"),
        ({"chunk_size": 0}, "chunk_size must be None or an integer of at least 1, got 0"),
        ({"operations": "relu"}, "operations must be .* got 'relu'"),
    ],
)
def test_it_refuses(changes, message):
    hidden, weight, bias, labels = make_inputs(torch.float32)
    arguments = {"hidden": hidden, "weight": weight, "labels": labels, "bias": bias, **changes}
    with pytest.raises(ValueError, match=message):
        chunked_cross_entropy(**arguments)
