"""The error of the layers' attention outputs: against its definition, whom it asks, and what it refuses."""

import copy
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model

from flash_dmattn_hf import iter_gates
from flash_dmattn_hf.conversion.variants import dense
from flash_dmattn_hf.gates.soft_selection import soft_selection
from flash_dmattn_hf.training.attention_outputs import AttentionOutputs, attention_error
from flash_dmattn_hf.training.distillation import DistillationTrainer
from flash_dmattn_hf.training.distillation_batch import weights_of_tokens
from flash_dmattn_hf.training.distillation_loss import TokenWeights
from flash_dmattn_hf.training.gate_preparation import prepare_gates

from ..tiny import tiny_model
from .distillation_setup import LENGTH, freeze_backbone, log_of, make_model, make_trainer, text


def layers(count: int = 3, *, batch: int = 2, length: int = 5, dtype=torch.float64) -> list[torch.Tensor]:
    return [torch.randn(batch, length, 4 + index, dtype=dtype) for index in range(count)]


def by_definition(found, expected, weights):
    """sum w |found - expected|^2 / sum w |expected|^2 of every layer and example, one token at a time; their mean."""
    errors = []
    for ours, theirs in zip(found, expected, strict=True):
        for example, example_weights in enumerate(weights.view(ours.shape[:2])):
            above = below = 0.0
            for row, weight in enumerate(example_weights):
                if weight > 0:
                    mine, other = ours[example, row], theirs[example, row]
                    above = above + weight * sum((a - b) ** 2 for a, b in zip(mine, other, strict=True))
                    below = below + weight * sum(b**2 for b in other)
            errors.append(above / below)
    return sum(errors) / len(errors)


def of_tokens(weights: torch.Tensor) -> TokenWeights:
    return TokenWeights(weights, weights.sum(), (weights > 0).sum())


@pytest.mark.parametrize("is_weighted", [True, False])
def test_the_error_and_its_gradient_are_those_of_the_definition(is_weighted):
    torch.manual_seed(0)
    found, expected = layers(), layers()
    weights = torch.tensor([1.0, 4, 0, 1, 2, 1, 1, 1, 0, 3], dtype=torch.float64) if is_weighted else torch.ones(10)
    for tensor in found:
        tensor.requires_grad_(True)
    error = attention_error(found, expected, of_tokens(weights) if is_weighted else None, None)
    reference = by_definition(found, expected, weights)
    torch.testing.assert_close(error, reference)
    for got, want in zip(torch.autograd.grad(3 * error, found), torch.autograd.grad(3 * reference, found), strict=True):
        torch.testing.assert_close(got, want)
    assert torch.autograd.gradcheck(lambda *f: attention_error(f, expected, None, None), found)


def test_equal_outputs_have_no_error_and_none_have_one():
    found = [tensor.requires_grad_(True) for tensor in layers()]
    assert attention_error(found, [tensor.detach() for tensor in found], None, None) == 0
    zeros = [torch.zeros_like(tensor).requires_grad_(True) for tensor in found]
    assert attention_error(zeros, [tensor.detach() for tensor in found], None, None).item() == pytest.approx(1)


def test_tokens_that_do_not_count_may_hold_anything():
    torch.manual_seed(0)
    found, expected = layers(1), layers(1)
    weights = torch.ones(10)
    weights[3] = 0
    clean = attention_error([found[0].clone().requires_grad_(True)], expected, of_tokens(weights), None)
    found[0].view(10, -1)[3], expected[0].view(10, -1)[3] = torch.nan, torch.inf
    found[0].requires_grad_(True)
    error = attention_error(found, expected, of_tokens(weights), None)
    assert error == clean
    (gradient,) = torch.autograd.grad(error, found)
    assert gradient.isfinite().all() and not gradient.view(10, -1)[3].any()


def test_half_precision_is_summed_in_float32():
    torch.manual_seed(0)
    found, expected = layers(dtype=torch.bfloat16, length=4000), layers(dtype=torch.bfloat16, length=4000)
    with torch.autocast("cpu", torch.bfloat16):
        error = attention_error([tensor.requires_grad_(True) for tensor in found], expected, None, None)
    exact = attention_error(
        [tensor.double().detach().requires_grad_(True) for tensor in found], [t.double() for t in expected], None, None
    )
    assert error.dtype == torch.float32 and error.item() == pytest.approx(exact.item(), rel=1e-5)


def test_outputs_of_another_shape_or_without_a_gradient_are_refused():
    found = [tensor.requires_grad_(True) for tensor in layers()]
    with pytest.raises(ValueError, match=r"must give out \(2, 5, 4\) as the student's does, got \(2, 5, 3\)"):
        attention_error(found, [tensor[..., :-1] for tensor in layers()], None, None)
    with pytest.raises(ValueError, match="use_reentrant=False"):
        attention_error(layers(), layers(), None, None)


def test_what_is_collected_is_what_the_modules_give_out_in_the_block_alone():
    model = make_model().eval()
    modules, given = [module for _, module, _ in iter_gates(model)], []
    for module in modules:
        module.register_forward_hook(lambda _, __, output: given.append(output[0]))
    ids = text(LENGTH)[None]
    with AttentionOutputs(model, model) as outputs, torch.no_grad():
        with outputs.of_student() as found:
            model(ids, use_cache=False)
        assert len(found) == len(modules) and all(map(torch.equal, found, given))
        model(ids, use_cache=False)
        assert not any("_attention_output" in vars(module) for module in modules)
        with pytest.raises(RuntimeError, match=f"{len(modules)} of {len(modules)} attention modules have not run"):
            with outputs.of_teacher():
                pass
    hooks = [len(module._forward_hooks) for module in modules]
    assert hooks == [len(module._forward_hooks) for _, module, _ in iter_gates(copy.deepcopy(model))]
    model(ids, use_cache=False)
    assert not any("_attention_output" in vars(module) for module in modules)


def test_the_loss_is_kl_and_the_weighted_error_of_attention(tmp_path):
    model = make_model()
    freeze_backbone(model)
    options = {"max_steps": 1, "first_temperature": 0.4, "selection_band": 2.0}
    trainer = make_trainer(model, tmp_path, attention_weight=0.7, **options)
    examples = [trainer.train_dataset[index] for index in range(4)]
    batch = {name: torch.stack([example[name] for example in examples]) for name in examples[0]}
    start = copy.deepcopy(model).eval()
    prepare_gates(start, [example["input_ids"] for example in examples])

    def outputs_of(*blocks):
        given, hooks = [], []
        for _, module, _ in iter_gates(start):
            hooks.append(module.register_forward_hook(lambda _, __, output: given.append(output[0].detach())))
        for block in blocks:
            block.__enter__()
        with torch.no_grad():
            start(batch["input_ids"], use_cache=False)
        for block in blocks:
            block.__exit__(None, None, None)
        for hook in hooks:
            hook.remove()
        return given

    expected = outputs_of(dense(start))
    found = outputs_of(soft_selection(start, temperature=0.4, band=2.0))
    weights = weights_of_tokens(batch["token_weights"], None).own
    reference = by_definition(found, expected, weights).item()
    trainer.train()
    assert log_of(trainer, "attention_error") == pytest.approx([reference], rel=1e-4)
    plain = make_trainer(copy.deepcopy(start), tmp_path, attention_weight=0.0, **options)
    plain.train()
    assert log_of(trainer, "loss")[0] - 0.7 * reference == pytest.approx(log_of(plain, "loss")[0], rel=1e-4)
    assert not log_of(plain, "attention_error")


@pytest.mark.parametrize("kind", ["importance", "all", "lora"])
def test_the_error_falls_where_it_counts(tmp_path, kind):
    """Always on the same text, at one temperature; against a run without its weight, measured in the same way."""

    def error_after(weight):
        model = make_model()
        if kind == "importance":
            freeze_backbone(model)
        if kind == "lora":
            torch.manual_seed(3)
            lora = LoraConfig(r=4, target_modules="all-linear", modules_to_save=["dma"], task_type="CAUSAL_LM")
            model = get_peft_model(model, lora)
        options = {"max_steps": 40, "first_temperature": 0.3, "last_temperature": 0.3, "learning_rate": 1e-3}
        trainer = make_trainer(model, tmp_path, attention_weight=weight, **options)
        trainer.train_dataset = [trainer.train_dataset[index % 4] for index in range(160)]
        trainer.train()
        errors = log_of(trainer, "attention_error")
        assert not any(module._forward_hooks for _, module, _ in iter_gates(model))
        return errors[0], errors[-1]

    first, last = error_after(30.0)
    assert last < 0.9 * first
    assert last < error_after(1e-9)[1]


@pytest.mark.parametrize(
    "options",
    [
        {"gradient_checkpointing": True},
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
        {"torch_compile": True, "torch_compile_backend": "aot_eager"},
    ],
    ids=["gradient checkpointing", "accumulation", "torch_compile"],
)
def test_the_option_changes_no_weight(tmp_path, options):
    def weights_after(folder, **options):
        torch.compiler.reset()
        model = make_model()
        trainer = make_trainer(model, folder, max_steps=3, count=64, attention_weight=0.5, **options)
        trainer.train()
        return {name: parameter.detach() for name, parameter in model.named_parameters()}

    got, expected = weights_after(tmp_path / "with", **options), weights_after(tmp_path / "without")
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-3)


def test_reentrant_checkpointing_is_refused(tmp_path):
    options = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
    trainer = make_trainer(make_model(), tmp_path, max_steps=1, attention_weight=1.0, **options)
    with pytest.raises(ValueError, match="use_reentrant=False"):
        trainer.train()


def test_a_hidden_importance_and_a_hybrid_have_outputs_too(tmp_path):
    for model in (make_model(importance_input="hidden"), make_model("gemma2"), make_model("qwen3_next")):
        trainer = make_trainer(model, tmp_path, max_steps=1, attention_weight=1.0)
        trainer.train()
        assert 0 < log_of(trainer, "attention_error")[0] < 2


def test_another_teacher_is_compared_only_if_asked_and_if_it_has_the_modules(tmp_path):
    same = tiny_model("llama", initializer_range=0.3, seed=9)
    trainer = make_trainer(make_model(), tmp_path, max_steps=1, teacher=same, attention_weight=1.0)
    trainer.train()
    assert log_of(trainer, "attention_error")[0] > 0
    other = tiny_model("gpt_neox", initializer_range=0.3, seed=9)
    assert make_trainer(make_model(), tmp_path, teacher=other).attention_weight == 0
    with pytest.raises(ValueError, match="needs a teacher with the attention modules of the student, got .* without"):
        make_trainer(make_model(), tmp_path, teacher=other, attention_weight=1.0)
    wider = tiny_model("llama", hidden_size=48, initializer_range=0.3, seed=9)
    with pytest.raises(ValueError, match="the teacher's attention must give out"):
        make_trainer(make_model(), tmp_path, max_steps=1, teacher=wider, attention_weight=1.0).train()


def test_evaluation_has_the_divergence_alone(tmp_path):
    class Evaluated(DistillationTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            loss = super().compute_loss(model, inputs, *args, **kwargs)
            error = self._seen[-1][2].item()
            with torch.no_grad():
                self.found = loss.item(), super().compute_loss(model.eval(), inputs, *args, **kwargs).item(), error
            model.train()
            self._seen.pop()
            return loss

    trainer = make_trainer(make_model(), tmp_path, max_steps=1, attention_weight=5.0, trainer=Evaluated)
    trainer.train()
    loss, evaluated, error = trainer.found
    assert error > 0 and evaluated == pytest.approx(loss - 5 * error, rel=1e-4)


def test_a_rank_has_its_share_of_the_sums(monkeypatch):
    """Two ranks with half of the tokens each: the mean of what they return is the error of the whole."""
    torch.manual_seed(0)
    found, expected = layers(length=6), layers(length=6)
    weights = torch.rand(2, 6, dtype=torch.float64) + 0.1
    whole = attention_error([t.requires_grad_(True) for t in found], expected, of_tokens(weights.flatten()), None)
    sizes = [
        torch.stack([(w[..., None] * half.chunk(2, 1)[rank].square()).sum((1, 2)) for half in expected])
        for rank, w in enumerate(weights.chunk(2, 1))
    ]
    monkeypatch.setattr("torch.distributed.all_reduce", lambda own, group: own.copy_(sum(sizes)))
    shares = []
    for rank in range(2):
        context = SimpleNamespace(group=None, world_size=2, watching=nullcontext)
        own = of_tokens(weights.chunk(2, 1)[rank].flatten())
        halves = ([tensor.chunk(2, 1)[rank] for tensor in tensors] for tensors in (found, expected))
        shares.append(attention_error(*halves, own, context))
    torch.testing.assert_close(sum(shares) / 2, whole)
