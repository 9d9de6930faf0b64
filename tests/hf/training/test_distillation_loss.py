"""The KL divergence in chunks, its gradients and the agreement are those of the whole logits."""

import pytest
import torch
import torch.nn.functional as F

from flash_dmattn_hf.training.distillation_loss import TokenWeights, chunked_distillation_loss

from .distillation_definition import COUNT, OPERATIONS, gradients, make_inputs, whole


@pytest.mark.parametrize("chunk_size", [1, 7, 29, 100, None])
@pytest.mark.parametrize("bias", [(True, False), (False, True), (False, False)], ids=["student", "teacher", "none"])
@pytest.mark.parametrize(("operations", "of_teacher"), [("none", "softcap"), ("softcap", "scale"), ("scale", "none")])
def test_it_equals_the_whole_logits(operations, of_teacher, bias, chunk_size):
    student, teacher, weights = make_inputs(bias=bias[0], teacher_bias=bias[1])
    weights[[3, 28]] = 0.0
    names = {"operations": OPERATIONS[operations], "teacher_operations": OPERATIONS[of_teacher]}
    got = chunked_distillation_loss(**student, **teacher, **names, token_weights=weights, chunk_size=chunk_size)
    expected = whole(student, teacher, weights, *names.values())
    torch.testing.assert_close(tuple(got), expected, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(
        gradients(got.loss, student), gradients(expected[0], student), atol=1e-12, rtol=1e-12
    )


def test_parts_of_the_tokens_add_up_to_all_of_them():
    student, teacher, weights = make_inputs()
    weights[:10] = 0.0  # nothing of the first part counts
    expected = chunked_distillation_loss(**student, **teacher, token_weights=weights)
    parts = []
    for rows in (slice(0, 10), slice(10, COUNT)):
        some = {name: value[rows] if name.endswith("hidden") else value for name, value in (student | teacher).items()}
        own = TokenWeights(weights[rows], weights.sum(), (weights > 0).sum())
        parts.append(chunked_distillation_loss(**some, token_weights=own))
    assert parts[0].loss == 0 and parts[0].kld == 0
    for name, whole_value in expected._asdict().items():
        torch.testing.assert_close(sum(getattr(part, name) for part in parts), whole_value)
    torch.testing.assert_close(gradients(parts[0].loss + parts[1].loss, student), gradients(expected.loss, student))


@pytest.mark.parametrize("operations", OPERATIONS)
def test_gradcheck(operations):
    student, teacher, weights = make_inputs(count=5)

    def loss(*tensors):
        return chunked_distillation_loss(
            **dict(zip(student, tensors, strict=True)),
            **teacher,
            operations=OPERATIONS[operations],
            token_weights=weights[:5],
            chunk_size=2,
        ).loss

    assert torch.autograd.gradcheck(loss, tuple(student.values()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_its_error_is_that_of_the_whole_logits_in_low_precision(dtype):
    student, teacher, weights = make_inputs(dtype)
    exact = {name: tensor.detach().double().requires_grad_() for name, tensor in student.items()}
    truth = whole(exact, {name: tensor.double() for name, tensor in teacher.items()}, weights, "", "")
    plain = whole(student, teacher, weights, "float32", "float32")
    got = chunked_distillation_loss(**student, **teacher, token_weights=weights, chunk_size=7)
    for ours, theirs, exactly in zip(
        [got.loss, *gradients(got.loss, student)],
        [plain[0], *gradients(plain[0], student)],
        [truth[0], *gradients(truth[0], exact)],
        strict=True,
    ):
        error = (ours.double() - exactly).abs().max()
        assert error <= 2 * (theirs.double() - exactly).abs().max() + 1e-6


def test_a_student_that_is_its_teacher_has_no_loss():
    student, _, _ = make_inputs()
    teacher = {f"teacher_{name}": tensor.detach() for name, tensor in student.items()}
    got = chunked_distillation_loss(**student, **teacher)
    assert got.loss == 0 and got.kld == 0 and got.top1 == 1
    assert all(not gradient.any() for gradient in gradients(got.loss, student))


def test_a_token_of_weight_0_counts_for_nothing_whatever_it_holds():
    student, teacher, weights = make_inputs()
    weights[4] = 0.0
    expected = chunked_distillation_loss(**student, **teacher, token_weights=weights, chunk_size=7)
    broken = {name: tensor.detach().clone() for name, tensor in student.items()}
    broken["hidden"][4], teacher["teacher_hidden"][4] = torch.nan, torch.inf
    broken = {name: tensor.requires_grad_() for name, tensor in broken.items()}
    got = chunked_distillation_loss(**broken, **teacher, token_weights=weights, chunk_size=7)
    assert tuple(got) == tuple(expected)
    for ours, theirs in zip(gradients(got.loss, broken), gradients(expected.loss, student), strict=True):
        assert torch.equal(ours, theirs)


def test_a_word_that_both_rule_out_counts_for_nothing():
    student, teacher, _ = make_inputs(teacher_bias=True)
    with torch.no_grad():
        student["bias"][5] = teacher["teacher_bias"][5] = -torch.inf
    got = chunked_distillation_loss(**student, **teacher, chunk_size=7)
    assert got.loss.isfinite() and all(gradient.isfinite().all() for gradient in gradients(got.loss, student))


def test_only_what_is_trained_gets_a_gradient():
    student, teacher, _ = make_inputs()
    student["weight"].requires_grad_(False)
    chunked_distillation_loss(**student, **teacher).loss.backward()
    assert student["weight"].grad is None and student["hidden"].grad is not None and student["bias"].grad is not None


def test_all_logits_never_exist(monkeypatch):
    student, teacher, _ = make_inputs()
    rows, original = [], F.linear
    monkeypatch.setattr(F, "linear", lambda hidden, *rest: rows.append(len(hidden)) or original(hidden, *rest))
    chunked_distillation_loss(**student, **teacher, chunk_size=7)
    assert rows == [7, 7] * 4 + [1, 1]


WRONG = {
    "vocabulary": ({"teacher_weight": torch.zeros(36, 12)}, "the teacher must have the student's vocabulary of 37"),
    "tokens": ({"teacher_hidden": torch.zeros(28, 12)}, "teacher_hidden must have 29 tokens"),
    "width": ({"teacher_hidden": torch.zeros(29, 11)}, "teacher_hidden and teacher_weight must have shapes"),
    "dtype": ({"teacher_bias": torch.zeros(37).half()}, "teacher_bias must have the dtype of teacher_hidden"),
    "weights": ({"token_weights": torch.ones(29, dtype=torch.long)}, "token_weights must be floating point"),
    "operation": ({"operations": "sin"}, "operations must be"),
    "chunk": ({"chunk_size": 0}, "chunk_size must be None or an integer of at least 1"),
}


@pytest.mark.parametrize(("values", "sentence"), WRONG.values(), ids=WRONG.keys())
def test_what_does_not_fit_is_refused(values, sentence):
    student, teacher, _ = make_inputs(torch.float32)
    with pytest.raises(ValueError, match=sentence):
        chunked_distillation_loss(**{**student, **teacher, **values})


def test_it_compiles_to_one_graph():
    student, teacher, weights = make_inputs(torch.float32)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def loss(hidden):
        return chunked_distillation_loss(**{**student, "hidden": hidden}, **teacher, token_weights=weights).loss

    expected = chunked_distillation_loss(**student, **teacher, token_weights=weights).loss
    torch.testing.assert_close(loss(student["hidden"]), expected)
