"""The loss of a distillation as it is defined, on the logits of all tokens, and small output layers to try it on."""

import torch
import torch.nn.functional as F

from flash_dmattn_hf.training.output_layer import apply_operations

OPERATIONS = {"none": "", "softcap": "/3.0,tanh,*3.0", "scale": "*0.5"}
COUNT, VOCABULARY = 29, 37


def make_inputs(dtype=torch.float64, *, bias=True, teacher_bias=False, count=COUNT, seed=0):
    """Keyword arguments of a student of width 16 and a teacher of width 12."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    student = {"hidden": random(count, 16), "weight": random(VOCABULARY, 16), "bias": random(VOCABULARY)}
    teacher = {"hidden": random(count, 12), "weight": random(VOCABULARY, 12), "bias": random(VOCABULARY)}
    student = {name: tensor.requires_grad_() for name, tensor in student.items() if bias or name != "bias"}
    teacher = {f"teacher_{name}": tensor for name, tensor in teacher.items() if teacher_bias or name != "bias"}
    weights = torch.rand(count, generator=generator, dtype=torch.float64) + 0.5
    return student, teacher, weights


def whole(student, teacher, weights, operations, teacher_operations):
    """The definition, on the logits of all tokens."""
    logits = F.linear(*(student.get(name) for name in ("hidden", "weight", "bias")))
    logits = apply_operations(logits, operations)[0]
    expected = F.linear(*(teacher.get(f"teacher_{name}") for name in ("hidden", "weight", "bias")))
    expected = apply_operations(expected, teacher_operations)[0]
    rows = F.kl_div(logits.log_softmax(-1), expected.log_softmax(-1), reduction="none", log_target=True).sum(-1)
    counted = weights > 0
    same = (logits.argmax(-1) == expected.argmax(-1))[counted].double().mean()
    return (rows * weights).sum() / weights.sum(), rows[counted].mean(), same


def gradients(loss, student):
    student = list(student.values())
    return torch.autograd.grad(loss * 0.25, student)
