"""The divergences of single tokens and their gradients are those of the definition, from torch and from the kernel."""

import importlib.util
import os
import platform
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from flash_dmattn.backends import triton
from flash_dmattn_hf.training import divergence
from flash_dmattn_hf.training.distillation_loss import chunked_distillation_loss
from flash_dmattn_hf.training.divergence import find_divergences

from .distillation_definition import OPERATIONS, gradients, make_inputs, whole

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or not (DEVICE == "cuda" or triton.is_interpreted()),
    reason="Triton is not installed, or neither a GPU nor its interpreter is used",
)
BLOCK = 4096  # words that the kernel reads at a time
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
NOWHERE = -torch.inf

# -inf - -inf in the interpreter, where NaN is what a GPU gives as well
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")


@pytest.fixture(params=["torch", pytest.param("kernel", marks=needs_triton)])
def find(request, monkeypatch):
    """`find_divergences` with the kernel, in the interpreter where there is no GPU, or without it."""
    monkeypatch.setattr(divergence, "_is_for_kernel", lambda *tensors: request.param == "kernel")
    return find_divergences


def random(rows, vocabulary):
    return 3 * torch.randn(rows, vocabulary), 3 * torch.randn(rows, vocabulary)


def teacher_rules_out(rows, vocabulary):
    expected, logits = random(rows, vocabulary)
    expected[:, 1:][torch.rand(rows, vocabulary - 1) < 0.5] = NOWHERE
    return expected, logits


def both_rule_out(rows, vocabulary):
    expected, logits = teacher_rules_out(rows, vocabulary)
    logits[expected == NOWHERE] = NOWHERE
    expected[:, 1::3] = NOWHERE
    return expected, logits


def starts_with_words_that_are_ruled_out(rows, vocabulary):
    expected, logits = random(rows, vocabulary)
    expected[:, : vocabulary // 2] = NOWHERE
    logits[:, : vocabulary // 3] = NOWHERE
    return expected, logits


def huge(rows, vocabulary):
    expected, logits = torch.randn(2, rows, vocabulary)
    return 1e4 * expected, 1e4 * logits


def far_from_0(rows, vocabulary):
    expected, logits = random(rows, vocabulary)
    return expected + 1e4, logits - 1e4


def equal(rows, vocabulary):
    expected, _ = random(rows, vocabulary)
    return expected, expected.clone()


def ties(rows, vocabulary):
    return torch.randint(3, (2, rows, vocabulary)).float().unbind()


KINDS = [random, teacher_rules_out, both_rule_out, starts_with_words_that_are_ruled_out, huge, far_from_0, equal, ties]


def definition(expected, logits, factors):
    """Nats, equality of the likeliest words and gradient, in float64 on the CPU."""
    expected, logits, factors = (tensor.cpu().double() for tensor in (expected, logits, factors))
    p, q = expected.softmax(-1), logits.softmax(-1)
    nats = torch.where(p == 0, 0, p * (expected.log_softmax(-1) - logits.log_softmax(-1))).sum(-1)
    is_same = expected.argmax(-1) == logits.argmax(-1)
    counted = factors > 0
    gradient = torch.where(counted[:, None], (q - p) * factors[:, None], 0)
    return torch.where(counted, nats, 0), is_same & counted, gradient


def check(found, expected, gradient_dtype):
    nats, is_same, gradient = expected
    assert found.nats.dtype == torch.float32 and found.gradient.dtype == gradient_dtype
    torch.testing.assert_close(found.nats.cpu().double(), nats, atol=2e-6, rtol=2e-5)
    assert torch.equal(found.is_same.cpu().bool(), is_same)
    rounding = {torch.float32: 0.0, torch.bfloat16: 2**-8, torch.float16: 2**-11}[gradient_dtype]
    if DEVICE == "cpu" and gradient_dtype == torch.bfloat16:
        rounding = 2**-7  # Triton's interpreter cuts bits off
    torch.testing.assert_close(found.gradient.cpu().double(), gradient, atol=1e-6, rtol=1e-5 + rounding)


@pytest.mark.parametrize("vocabulary", [1, 100, BLOCK, 2 * BLOCK + 37])
@pytest.mark.parametrize(("of_teacher", "of_student"), [("float32", "float32"), ("bfloat16", "bfloat16")])
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_it_equals_the_definition(find, kind, of_teacher, of_student, vocabulary):
    expected, logits = kind(5, vocabulary)
    expected, logits = expected.to(DEVICE, DTYPES[of_teacher]), logits.to(DEVICE, DTYPES[of_student])
    factors = torch.rand(5, device=DEVICE) + 0.5
    truth, before = definition(expected, logits, factors), logits.clone()
    found = find(expected, logits, factors, wants_gradient=True, may_overwrite=False)
    check(found, truth, torch.float32)
    assert torch.equal(logits, before)


@needs_triton
@pytest.mark.parametrize("vocabulary", [1, 100, 2 * BLOCK + 37])
@pytest.mark.parametrize("of_teacher", DTYPES)
@pytest.mark.parametrize("of_student", DTYPES)
def test_the_gradient_takes_the_place_of_the_logits(monkeypatch, of_student, of_teacher, vocabulary):
    monkeypatch.setattr(divergence, "_is_for_kernel", lambda *tensors: True)
    expected, logits = random(4, vocabulary)
    expected, logits = expected.to(DEVICE, DTYPES[of_teacher]), logits.to(DEVICE, DTYPES[of_student])
    factors = torch.tensor([1.0, 0.0, 0.25, 4.0], device=DEVICE)
    truth = definition(expected, logits, factors)
    found = find_divergences(expected, logits, factors, wants_gradient=True, may_overwrite=True)
    assert found.gradient.data_ptr() == logits.data_ptr()
    check(found, truth, DTYPES[of_student])


def test_without_a_gradient_nothing_is_written(find):
    expected, logits = (tensor.to(DEVICE) for tensor in random(5, 100))
    factors, before = torch.ones(5, device=DEVICE), logits.clone()
    found = find(expected, logits, factors, wants_gradient=False, may_overwrite=True)
    assert found.gradient is None and torch.equal(logits, before)
    truth = definition(expected, logits, factors)[0]
    torch.testing.assert_close(found.nats.cpu().double(), truth, atol=2e-6, rtol=2e-5)


@pytest.mark.parametrize("may_overwrite", [True, False])
def test_a_token_that_does_not_count_may_hold_anything(find, may_overwrite):
    expected, logits = random(6, BLOCK + 3)
    factors = torch.tensor([1.0, 0.0, -2.0, 0.5, torch.nan, 0.0])
    truth = definition(expected, logits, factors)
    expected[1], expected[2], expected[4], logits[1], logits[5] = torch.nan, torch.inf, NOWHERE, torch.nan, NOWHERE
    inputs = (tensor.to(DEVICE) for tensor in (expected, logits, factors))
    check(find(*inputs, wants_gradient=True, may_overwrite=may_overwrite), truth, torch.float32)


@pytest.mark.parametrize("of_student", [True, False], ids=["student", "teacher"])
def test_nan_in_a_token_that_counts_is_not_hidden(find, of_student):
    expected, logits = (tensor.to(DEVICE) for tensor in random(3, 100))
    (logits if of_student else expected)[1, 7] = torch.nan
    found = find(expected, logits, torch.ones(3, device=DEVICE), wants_gradient=True, may_overwrite=False)
    assert found.nats.isnan().tolist() == [False, True, False]
    assert found.gradient.isnan().all(1).tolist() == [False, True, False]


def test_logits_of_any_strides(find):
    expected, logits = random(100, 5)
    expected, logits = expected.to(DEVICE).t(), logits.to(DEVICE).t()
    factors = torch.rand(10, device=DEVICE)[::2]
    truth = definition(expected, logits, factors)
    check(find(expected, logits, factors, wants_gradient=True, may_overwrite=True), truth, torch.float32)


@needs_triton
@pytest.mark.skipif(DEVICE == "cuda", reason="test_gpu_distillation_loss.py has the loss on a GPU")
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("operations", [*OPERATIONS.values(), "*0.1,tanh", "float32", "float32,*0.1,tanh"])
def test_the_loss_goes_through_the_kernel(monkeypatch, operations, bias):
    monkeypatch.setattr(divergence, "_is_for_kernel", lambda *tensors: True)
    student, teacher, weights = make_inputs(torch.float32, bias=bias, teacher_bias=True)
    weights[[3, 28]] = 0.0
    names = {"operations": operations, "teacher_operations": "*0.1,tanh,*2.0"}
    got = chunked_distillation_loss(**student, **teacher, **names, token_weights=weights, chunk_size=7)
    exact = {name: tensor.detach().double().requires_grad_() for name, tensor in student.items()}
    teacher = {name: tensor.double() for name, tensor in teacher.items()}
    truth = whole(exact, teacher, weights.float().double(), operations.replace("float32,", ""), "*0.1,tanh,*2.0")
    for ours, exactly in zip(got, truth, strict=True):
        torch.testing.assert_close(ours.double(), exactly, atol=1e-6, rtol=1e-5)
    for ours, exactly in zip(gradients(got.loss, student), gradients(truth[0], exact), strict=True):
        torch.testing.assert_close(ours.double(), exactly, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("changes", "is_for_kernel"),
    [
        ({}, True),
        ({"expected": torch.bfloat16, "logits": torch.float16}, True),
        ({"expected": torch.float64}, False),
        ({"logits": torch.float64, "factors": torch.float64}, False),
        ({"device": "cpu"}, False),
        ({"device": "meta"}, False),
        ({"why": "Triton cannot be imported"}, False),
    ],
    ids=lambda value: ", ".join(f"{name}: {what}" for name, what in value.items()) if isinstance(value, dict) else None,
)
def test_who_is_served_by_the_kernel(monkeypatch, changes, is_for_kernel):
    monkeypatch.setattr(triton, "why_unavailable", lambda: changes.get("why"))
    device = SimpleNamespace(type=changes.get("device", "cuda"))
    tensors = [
        SimpleNamespace(device=device, dtype=changes.get(name, torch.float32))
        for name in ("expected", "logits", "factors")
    ]
    assert divergence._is_for_kernel(*tensors) is is_for_kernel


def run_python(*arguments, **environment):
    others = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env={**others, **environment})
    assert run.returncode == 0, run.stderr[-2000:]
    return run.stdout


def test_nothing_asks_for_triton_where_it_is_not_installed():
    program = """
import sys
sys.modules["triton"] = None  # an import of it raises ImportError
import torch
from flash_dmattn_hf.training import chunked_distillation_loss
hidden, weight = torch.randn(5, 4), torch.randn(9, 4)
print(chunked_distillation_loss(hidden, weight, hidden, weight).loss.item())
"""
    assert run_python("-c", program).strip() == "0.0"


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or platform.system() != "Linux",
    reason="Triton brings its assembler along on Linux only",
)
@pytest.mark.parametrize("capability", [80, 89, 90])
def test_the_kernel_compiles(capability, tmp_path):
    script = str(Path(__file__).with_name("compile_divergence.py"))
    lines = run_python(script, str(capability), TRITON_CACHE_DIR=str(tmp_path)).splitlines()
    assert len(lines) == 6
    for line in lines:
        *_, shared, stack = line.split()
        assert int(shared) <= 99 * 1024 and int(stack) == 0, line
