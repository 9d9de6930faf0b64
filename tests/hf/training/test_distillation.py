"""DistillationTrainer: what it minimises, whom it learns from, what it moves, and that a run can be resumed."""

import copy
import time

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from flash_dmattn_hf import iter_gates
from flash_dmattn_hf.conversion.variants import dense
from flash_dmattn_hf.evaluation import agreement
from flash_dmattn_hf.gates.soft_selection import soft_selection
from flash_dmattn_hf.training import distillation_checks
from flash_dmattn_hf.training.distillation import DistillationTrainer
from flash_dmattn_hf.training.distillation_arguments import DistillationArguments
from flash_dmattn_hf.training.distillation_course import WARMUP_STEPS
from flash_dmattn_hf.training.far_reuse import FarReuse
from flash_dmattn_hf.training.gate_preparation import prepare_gates

from ..tiny import tiny_model
from .distillation_setup import LENGTH, WINDOW, freeze_backbone, held_out, log_of, make_model, make_trainer, text


def adapted(**options):
    """A converted model inside a PeftModel, with LoRA on the projections and trainable gates."""
    torch.manual_seed(3)
    lora = LoraConfig(r=4, target_modules="all-linear", modules_to_save=["dma"], task_type="CAUSAL_LM", **options)
    return get_peft_model(make_model(), lora)


def weights_of(model) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@torch.no_grad()
def dense_logits(model, input_ids):
    with dense(model):
        return model.eval()(input_ids, use_cache=False).logits


HEADS = {
    "llama": {},
    "gemma2": {"final_logit_softcapping": 3.0},
    "cohere": {"logit_scale": 0.25},
    "phi": {},  # its output layer has a bias
}


@pytest.mark.parametrize(("model_type", "values"), HEADS.items())
def test_the_loss_is_the_weighted_kl_from_dense_to_soft(tmp_path, model_type, values):
    model = make_model(model_type)
    for name, value in values.items():
        setattr(model.config, name, value)
        setattr(model, name, value)
    freeze_backbone(model)
    options = {"first_temperature": 0.4, "selection_band": 2.0, "attention_weight": 0.0}
    trainer = make_trainer(model, tmp_path, max_steps=1, **options)
    examples = [trainer.train_dataset[index] for index in range(4)]
    batch = {name: torch.stack([example[name] for example in examples]) for name in examples[0]}
    assert len(set(batch["token_weights"].flatten().tolist())) == 2
    start = copy.deepcopy(model)
    prepare_gates(start, [example["input_ids"] for example in examples])
    expected = dense_logits(start, batch["input_ids"]).log_softmax(-1)
    with torch.no_grad(), soft_selection(start, temperature=0.4, band=2.0):
        found = start(batch["input_ids"], use_cache=False).logits.log_softmax(-1)
    rows = F.kl_div(found, expected, reduction="none", log_target=True).sum(-1)
    of_examples = (rows * batch["token_weights"]).sum(1) / batch["token_weights"].sum(1)
    trainer.train()
    assert log_of(trainer, "loss") == pytest.approx([of_examples.mean().item()], rel=1e-4)
    assert log_of(trainer, "kld") == pytest.approx([rows.mean().item()], rel=1e-4)
    same = (found.argmax(-1) == expected.argmax(-1)).float().mean().item()
    assert log_of(trainer, "top1") == pytest.approx([same], abs=1e-3)


def test_kld_falls_when_all_weights_train(tmp_path):
    options = {"max_steps": 60, "learning_rate": 3e-3, "logging_steps": 10, "held_out": held_out()}
    trainer = make_trainer(make_model(), tmp_path, **options)
    trainer.train()
    kld = log_of(trainer, "held_out/kld")
    assert len(kld) == 5 and kld[-1] < 0.75 * kld[0]


def test_kld_falls_when_the_importance_trains_alone_and_the_backbone_stays(tmp_path):
    """At one temperature, on text that it sees again and again."""
    model = make_model()
    backbone = freeze_backbone(model)
    frozen = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    gates = {name: p.detach().clone() for name, p in model.named_parameters() if "dt_proj" in name}
    trainer = make_trainer(model, tmp_path, max_steps=60, first_temperature=0.3, last_temperature=0.3)
    trainer.train_dataset = [trainer.train_dataset[index % 4] for index in range(240)]
    trainer.train()
    kld = log_of(trainer, "kld")
    assert kld[-1] < 0.9 * kld[0]
    after = dict(model.named_parameters())
    assert all(torch.equal(after[name], weight) for name, weight in backbone.items())
    assert not any(torch.equal(after[name], weight) for name, weight in gates.items())
    assert {name: parameter.requires_grad for name, parameter in after.items()} == frozen
    assert not any(gate.soft_selections for _, _, gate in iter_gates(model))


def test_with_the_importance_in_the_logits_a_stays(tmp_path):
    model = make_model(add_importance_bias=True)
    before = weights_of(model)
    make_trainer(model, tmp_path, max_steps=3).train()
    for name, weight in weights_of(model).items():
        assert torch.equal(weight, before[name]) == name.endswith(".A"), name


def test_a_frozen_copy_teaches_when_all_weights_train(tmp_path):
    model = make_model()
    expected = dense_logits(copy.deepcopy(model), text(LENGTH)[None])
    trainer = make_trainer(model, tmp_path, max_steps=4, learning_rate=1e-2)
    trainer.train()
    teacher = trainer.teacher.logits({"input_ids": text(LENGTH)[None]})
    hidden, weight, _ = teacher.operands()
    torch.testing.assert_close((hidden @ weight.T)[None], expected, atol=1e-4, rtol=1e-4)
    assert not any(p.requires_grad for p in trainer.teacher.model.parameters())
    assert (dense_logits(model, text(LENGTH)[None]) - expected).abs().max() > 0.1


def test_under_bf16_autocast_the_copy_has_bf16_weights_and_exact_buffers(tmp_path):
    trainer = make_trainer(make_model(), tmp_path, max_steps=2, bf16=True)
    assert {p.dtype for p in trainer.teacher.model.parameters()} == {torch.bfloat16}
    assert {b.dtype for b in trainer.teacher.model.buffers()} == {torch.float32}
    trainer.train()
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}


def test_an_adapter_learns_from_the_model_without_it(tmp_path):
    model = adapted(init_lora_weights=False)
    with model.disable_adapter():
        expected = dense_logits(model.get_base_model(), text(LENGTH)[None])
    trainer = make_trainer(model, tmp_path, max_steps=2)
    hidden, weight, _ = trainer.teacher.logits({"input_ids": text(LENGTH)[None]}).operands()
    assert trainer.teacher.model is model
    torch.testing.assert_close((hidden @ weight.T)[None], expected, atol=1e-4, rtol=1e-4)
    before = weights_of(model)
    trainer.train()
    for name, weight in weights_of(model).items():
        trains = "lora_" in name or "modules_to_save" in name  # A has become 1
        assert torch.equal(weight, before[name]) != trains, name


@pytest.mark.parametrize("is_converted", [True, False])
def test_another_model_of_the_same_vocabulary_can_teach(tmp_path, is_converted):
    teacher = tiny_model("qwen3", hidden_size=48, initializer_range=0.3, seed=9)
    expected = teacher(text(LENGTH)[None], use_cache=False).logits
    if is_converted:
        teacher.set_attn_implementation("flash_dmattn")
    trainer = make_trainer(make_model(), tmp_path, max_steps=1, teacher=teacher)
    hidden, weight, _ = trainer.teacher.logits({"input_ids": text(LENGTH)[None]}).operands()
    torch.testing.assert_close((hidden @ weight.T)[None], expected, atol=1e-4, rtol=1e-4)
    trainer.train()


def test_a_teacher_of_another_vocabulary_is_refused(tmp_path):
    teacher = tiny_model("llama", vocab_size=98)
    with pytest.raises(ValueError, match="teacher must have the student's vocabulary of 99 words, got 98"):
        make_trainer(make_model(), tmp_path, teacher=teacher)


def test_models_that_cannot_be_distilled_are_refused(tmp_path):
    with pytest.raises(ValueError, match="must be one that convert_model has given dynamic masks"):
        make_trainer(tiny_model("llama"), tmp_path)
    model = get_peft_model(make_model(), LoraConfig(target_modules="all-linear"))
    with pytest.raises(ValueError, match=r'the adapter must have modules_to_save=\["dma"\]'):
        make_trainer(model, tmp_path)


def test_without_contested_keys_only_a_backbone_can_train(tmp_path):
    """The control of every result: sinks and a window, trained for as many steps."""
    model = make_model(keep_window_size=WINDOW, num_sink_tokens=4, local_window_size=WINDOW - 4)
    make_trainer(model, tmp_path, max_steps=1).train()
    freeze_backbone(model)
    with pytest.raises(ValueError, match="no key is kept for its importance"):
        make_trainer(model, tmp_path, max_steps=1)


WRONG = {
    "first_temperature": (0.0, "first_temperature must be above 0, got 0.0"),
    "last_temperature": (-1.0, "last_temperature must be above 0, got -1.0"),
    "selection_band": (0.5, "selection_band must be None or at least 1, got 0.5"),
    "hard_share": (1.0, "hard_share must be at least 0 and below 1, got 1.0"),
    "max_minutes": (0.0, "max_minutes must be above 0, got 0.0"),
    "gate_learning_rate": (0.0, "gate_learning_rate must be above 0, got 0.0"),
    "attention_weight": (-1.0, "attention_weight must be None or at least 0, got -1.0"),
    "clip_norm": (0.0, "clip_norm must be above 0, got 0.0"),
    "max_grad_norm": (1.0, "max_grad_norm must be 0, got 1.0"),
    "num_evaluations": (-1, "num_evaluations must be at least 0, got -1"),
}


@pytest.mark.parametrize(("name", "value", "sentence"), [(name, *rest) for name, rest in WRONG.items()])
def test_arguments_out_of_range_are_refused(tmp_path, name, value, sentence):
    with pytest.raises(ValueError, match=sentence):
        DistillationArguments(output_dir=str(tmp_path), **{name: value})


class Recorded(DistillationTrainer):
    """Notes of every step: share of the run, temperature (None: hard), learning rates."""

    notes = ()

    def compute_loss(self, *args, **kwargs):
        temperature = None if self._soft is None else self._soft.temperature
        rates = [group["lr"] for group in self.optimizer.param_groups]
        is_soft = all(gate.soft_selections for _, _, gate in iter_gates(self.model))
        assert is_soft == (temperature is not None)
        self.notes = (*self.notes, (self.lr_scheduler.share, temperature, rates))
        return super().compute_loss(*args, **kwargs)


@pytest.mark.parametrize("stage", ["importance", "all"])
def test_temperature_and_learning_rates_follow_the_steps(tmp_path, stage):
    model = make_model()
    if stage == "importance":
        freeze_backbone(model)
    trainer = make_trainer(model, tmp_path, max_steps=40, trainer=Recorded, logging_steps=40)
    trainer.train()
    first, last, rates = (0.3, 0.02, [1e-2]) if stage == "importance" else (0.15, 0.02, [5e-5, 1e-2])
    for step, (share, temperature, found) in enumerate(trainer.notes):
        assert share == step / 40
        assert temperature == pytest.approx(first * (last / first) ** share)
        factor = min(1, (step + 1) / WARMUP_STEPS) * (1 - share) ** 0.5
        assert found == pytest.approx([rate * factor for rate in rates])
    assert log_of(trainer, "gate_learning_rate") == [trainer.notes[-1][2][-1]]


def test_the_last_share_has_the_hard_mask(tmp_path):
    trainer = make_trainer(make_model(), tmp_path, max_steps=8, hard_share=0.25, trainer=Recorded)
    trainer.train()
    temperatures = [temperature for _, temperature, _ in trainer.notes]
    assert temperatures[6:] == [None, None]
    assert temperatures[:6] == pytest.approx([0.15 * (0.02 / 0.15) ** (step / 6) for step in range(6)])
    assert len(log_of(trainer, "temperature")) == 6


def test_a_hard_mask_without_a_gradient_is_refused(tmp_path):
    model = make_model()
    freeze_backbone(model)
    with pytest.raises(ValueError, match="hard_share must be 0, got 0.5: nothing would have a gradient"):
        make_trainer(model, tmp_path, hard_share=0.5)


def test_a_run_limited_by_time_ends_with_it_and_schedules_follow(tmp_path, monkeypatch):
    now = [100.0]

    class Clocked(Recorded):
        def compute_loss(self, *args, **kwargs):
            now[0] += 3.0
            return super().compute_loss(*args, **kwargs)

    class SlowHeldOut(type(held_out())):
        def measure(self, *args):
            now[0] += 1000.0
            return super().measure(*args)

    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    slow = SlowHeldOut(text(256, seed=1), context_length=LENGTH)
    trainer = make_trainer(
        make_model(), tmp_path, max_steps=1000, max_minutes=0.5, trainer=Clocked, held_out=slow, num_evaluations=2
    )
    trainer.train()
    assert [share for share, _, _ in trainer.notes] == pytest.approx([step / 10 for step in range(10)])
    temperatures = [temperature for _, temperature, _ in trainer.notes]
    assert temperatures == pytest.approx([0.15 * (0.02 / 0.15) ** (step / 10) for step in range(10)])
    assert len(log_of(trainer, "held_out/kld")) == 3
    assert log_of(trainer, "tokens_per_second") == pytest.approx([4 * LENGTH / 3.0] * 10)


@pytest.mark.parametrize(
    ("kind", "hard_share"), [("importance", 0.0), ("all", 0.0), ("all", 0.25), ("lora", 0.0), ("lora", 0.25)]
)
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, kind, hard_share):
    def run(folder, resume=None):
        model = adapted() if kind == "lora" else make_model()
        if kind == "importance":
            freeze_backbone(model)
        options = {"save_strategy": "steps", "save_steps": 3, "held_out": held_out(), "hard_share": hard_share}
        trainer = make_trainer(model, folder, count=64, **options)
        trainer.train(resume_from_checkpoint=resume)
        return weights_of(model), trainer

    whole, whole_trainer = run(tmp_path)
    resumed, resumed_trainer = run(tmp_path / "resumed", str(tmp_path / "checkpoint-3"))
    assert resumed_trainer.state.global_step == 8
    for name in ("loss", "kld", "temperature", "held_out/kld", "held_out/gap", "held_out/window_loss"):
        assert log_of(resumed_trainer, name) == log_of(whole_trainer, name), name
    assert len(log_of(whole_trainer, "held_out/window_loss")) == 1
    for name, weight in whole.items():
        assert torch.equal(resumed[name], weight), name


def test_a_run_limited_by_time_resumes_with_its_time(tmp_path, monkeypatch):
    now = [0.0]

    class Clocked(Recorded):
        def compute_loss(self, *args, **kwargs):
            now[0] += 6.0
            return super().compute_loss(*args, **kwargs)

    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    options = {"max_steps": 1000, "max_minutes": 1.0, "trainer": Clocked, "save_strategy": "steps", "save_steps": 4}
    make_trainer(make_model(), tmp_path, **options).train()
    now[0] = 5000.0
    trainer = make_trainer(make_model(), tmp_path / "resumed", **options)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert [share for share, _, _ in trainer.notes] == pytest.approx([step / 10 for step in range(4, 10)])


def weights_after(folder, **options):
    model = make_model()
    make_trainer(model, folder, max_steps=3, count=64, **options).train()
    return weights_of(model)


@pytest.mark.parametrize(
    "options",
    [
        {"gradient_checkpointing": True},
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
        {"dataloader_num_workers": 2},
        {"torch_compile": True, "torch_compile_backend": "eager"},
    ],
    ids=["gradient checkpointing", "accumulation", "workers", "torch_compile"],
)
def test_the_option_changes_no_weight(tmp_path, options):
    got, expected = weights_after(tmp_path / "with", **options), weights_after(tmp_path / "without")
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-3)


def test_bf16_autocast_stays_near_float32(tmp_path):
    def losses(**options):
        trainer = make_trainer(make_model(), tmp_path, max_steps=2, **options)
        trainer.train()
        return log_of(trainer, "loss")

    assert losses(bf16=True) == pytest.approx(losses(), rel=0.1)


def test_held_out_figures_are_those_of_the_hard_mask(tmp_path):
    trainer = make_trainer(make_model(), tmp_path, held_out=held_out(max_stretches=4), num_evaluations=1)
    trainer.train()
    options = {"context_length": LENGTH, "first_row": WINDOW, "max_stretches": 4}
    near = agreement(trainer.model, text(256, seed=1), reference=trainer.teacher.model, **options)
    assert log_of(trainer, "held_out/kld")[-1] == near.kld and log_of(trainer, "held_out/top1")[-1] == near.top1
    (window,), dense_loss = log_of(trainer, "held_out/window_loss"), near.reference_loss
    assert log_of(trainer, "held_out/gap")[-1] == pytest.approx((window - near.loss) / (window - dense_loss))


def test_held_out_text_must_hold_a_stretch():
    with pytest.raises(ValueError, match="held-out text must hold at least 64 tokens, got 63"):
        type(held_out())(text(63), context_length=LENGTH)


def test_weights_that_would_round_the_steps_away_are_refused(tmp_path):
    model = make_model().to(torch.bfloat16)
    with pytest.raises(ValueError, match="what trains must be float32, got .* in torch.bfloat16"):
        make_trainer(model, tmp_path, max_steps=1)


@pytest.mark.parametrize("weight_of_padding", [0.0, 1.0])
def test_padding_counts_for_nothing(tmp_path, weight_of_padding):
    data = FarReuse(text(), length=LENGTH, count=8)
    padded = [
        {
            "input_ids": F.pad(example["input_ids"], (0, 16)),
            "attention_mask": F.pad(torch.ones(LENGTH, dtype=torch.long), (0, 16)),
            "token_weights": F.pad(example["token_weights"], (0, 16), value=weight_of_padding),
        }
        for example in data
    ]

    def losses(dataset):
        model = make_model()
        freeze_backbone(model)
        trainer = make_trainer(model, tmp_path, max_steps=1)
        trainer.train_dataset = dataset
        with soft_selection(model, temperature=0.5):
            batch = trainer.data_collator(dataset[:4] if isinstance(dataset, list) else [dataset[i] for i in range(4)])
            return trainer.compute_loss(model, batch).item()

    assert losses(padded) == pytest.approx(losses(data), rel=1e-4)


def test_a_checkpoint_of_the_trainer_is_an_ordinary_one(tmp_path):
    model = make_model()
    make_trainer(model, tmp_path, max_steps=2, save_strategy="steps", save_steps=2).train()
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-2", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    with torch.no_grad():
        expected = model.eval()(text(LENGTH)[None], use_cache=False).logits
        assert torch.equal(loaded.eval()(text(LENGTH)[None], use_cache=False).logits, expected)


def test_zero3_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(distillation_checks, "is_deepspeed_zero3_enabled", lambda: True)
    with pytest.raises(ValueError, match="does not support ZeRO-3 of DeepSpeed"):
        make_trainer(make_model(), tmp_path)
