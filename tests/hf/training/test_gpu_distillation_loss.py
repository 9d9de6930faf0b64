"""The loss of a distillation on a GPU, where one kernel finds divergences and gradients: right, and in less memory."""

import pytest
import torch

from flash_dmattn_hf.training import divergence
from flash_dmattn_hf.training.distillation_loss import CHUNK_ENTRIES, chunked_distillation_loss

from .distillation_definition import gradients, whole

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]

COUNT, VOCABULARY = 200, 5003  # more than one block, and not a multiple of it
OPERATIONS = {"none": "", "scale": "*0.5", "tanh": "*0.1,tanh", "softcap": "float32,/3.0,tanh,*3.0"}


@pytest.fixture
def launches(monkeypatch):
    """A list with an entry for every launch of the kernel."""
    from flash_dmattn_hf.training import divergence_kernel

    seen, original = [], divergence_kernel.run_divergence
    monkeypatch.setattr(divergence_kernel, "run_divergence", lambda *given: seen.append(given) or original(*given))
    return seen


def make_layers(dtype, bias, count=COUNT, vocabulary=VOCABULARY, sizes=(64, 48)):
    """Student, teacher and weights of tokens, on the GPU."""
    student, teacher = (
        {
            "hidden": torch.randn(count, size, device="cuda").to(dtype),
            "weight": (torch.randn(vocabulary, size, device="cuda") * 1.5 / size**0.5).to(dtype),
            **({"bias": torch.randn(vocabulary, device="cuda").to(dtype)} if bias else {}),
        }
        for size in sizes
    )
    student = {name: tensor.requires_grad_() for name, tensor in student.items()}
    weights = torch.rand(count, device="cuda") + 0.5
    return student, {f"teacher_{name}": tensor for name, tensor in teacher.items()}, weights


def results(student, teacher, weights, **options):
    got = chunked_distillation_loss(**student, **teacher, token_weights=weights, **options)
    return got, gradients(got.loss, student)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("operations", OPERATIONS.values(), ids=OPERATIONS.keys())
def test_in_float32_it_equals_the_definition(launches, operations, bias):
    student, teacher, weights = make_layers(torch.float32, bias)
    weights[[3, 64, 199]] = 0.0
    exact = {name: tensor.detach().cpu().double().requires_grad_() for name, tensor in student.items()}
    true_teacher = {name: tensor.cpu().double() for name, tensor in teacher.items()}
    truth = whole(exact, true_teacher, weights.cpu().double(), operations.removeprefix("float32,"), "*0.5")
    with torch.no_grad():
        teacher["teacher_hidden"][64] = torch.nan  # padding
    options = {"operations": operations, "teacher_operations": "*0.5", "chunk_size": 64}
    got, ours = results(student, teacher, weights, **options)
    assert len(launches) == 4
    torch.testing.assert_close([value.cpu().double() for value in got], list(truth), atol=1e-6, rtol=2e-5)
    for name, found, exactly in zip(student, ours, gradients(truth[0], exact), strict=True):
        error = (found.cpu().double() - exactly).abs().max()
        assert error <= 1e-4 * exactly.abs().max(), name


@pytest.mark.parametrize("operations", OPERATIONS.values(), ids=OPERATIONS.keys())
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_its_error_in_low_precision_is_that_of_torch(monkeypatch, launches, dtype, operations):
    student, teacher, weights = make_layers(dtype, True)
    exact = {name: tensor.detach().cpu().double().requires_grad_() for name, tensor in student.items()}
    true_teacher = {name: tensor.cpu().double() for name, tensor in teacher.items()}
    truth = whole(exact, true_teacher, weights.cpu().double(), operations.removeprefix("float32,"), "")
    options = {"operations": operations, "chunk_size": 64}
    got, ours = results(student, teacher, weights, **options)
    assert len(launches) == 4
    monkeypatch.setattr(divergence, "_is_for_kernel", lambda *tensors: False)
    without, theirs = results(student, teacher, weights, **options)
    assert len(launches) == 4
    pairs = [(got.loss, without.loss, truth[0]), (got.kld, without.kld, truth[1])]
    pairs += zip(ours, theirs, gradients(truth[0], exact), strict=True)
    for found, of_torch, exactly in pairs:
        error, usual = ((value.cpu().double() - exactly).abs().max() for value in (found, of_torch))
        assert error <= 1.5 * usual + 1e-5 * exactly.abs().max()
    assert got.top1 == without.top1


def test_a_chunk_takes_the_bytes_of_its_logits(monkeypatch):
    vocabulary = 49152
    student, teacher, weights = make_layers(torch.bfloat16, False, count=4096, vocabulary=vocabulary, sizes=(64, 64))

    def taken():
        results(student, teacher, weights)  # what stays, such as the workspace of cuBLAS
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        results(student, teacher, weights)
        return torch.cuda.max_memory_allocated() - before

    ours = taken()
    monkeypatch.setattr(divergence, "_is_for_kernel", lambda *tensors: False)
    theirs = taken()
    of_one_model = 2 * CHUNK_ENTRIES
    assert ours < 2.5 * of_one_model < theirs / 2


def test_float64_is_left_to_torch(launches):
    student, teacher, weights = make_layers(torch.float64, True)
    got, _ = results(student, teacher, weights)
    assert got.loss.dtype == torch.float64 and not launches
