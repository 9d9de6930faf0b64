"""An unmodified Trainer trains a model with dynamic masks, whatever batches and options are chosen."""

import pytest
import torch
import torch._dynamo
from transformers import AutoModelForCausalLM

from .trainer_setup import COLLATORS, importance_of, losses, make_examples, make_model, make_trainer, pad

OPTIONS = {
    "plain": {},
    "gradient checkpointing": {"gradient_checkpointing": True},
    "accumulation": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
    "bf16 autocast": {"bf16": True},
    "torch_compile": {"torch_compile": True, "torch_compile_backend": "eager"},
}


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("option", ["plain", "gradient checkpointing", "accumulation", "bf16 autocast"])
@pytest.mark.parametrize("batches", COLLATORS)
def test_the_loss_falls_and_the_importance_moves(tmp_path, batches, option):
    model = make_model()
    before = importance_of(model)
    trainer = make_trainer(model, tmp_path, batches=batches, max_steps=12, **OPTIONS[option])
    trainer.train()
    history = losses(trainer)
    assert history[-1] < history[0] - 0.5
    for name, parameter in importance_of(model).items():
        assert not torch.equal(parameter, before[name]), name
        assert parameter.isfinite().all() and parameter.dtype == torch.float32


def weights_after(tmp_path, batches="padded", **options) -> dict[str, torch.Tensor]:
    model = make_model(spread=0.5)
    make_trainer(model, tmp_path, batches=batches, max_steps=3, max_grad_norm=0.0, optim="sgd", **options).train()
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize(
    ("batches", "option"),
    [
        ("padded", "gradient checkpointing"),
        ("packed", "gradient checkpointing"),
        ("padded", "accumulation"),
        ("packed", "accumulation"),
        ("padded", "torch_compile"),
        ("packed with cu_seqlens", "torch_compile"),
    ],
)
def test_the_option_changes_no_weight(tmp_path, batches, option):
    torch.testing.assert_close(
        weights_after(tmp_path / "with", batches, **OPTIONS[option]),
        weights_after(tmp_path / "without", batches),
        atol=2e-6,
        rtol=1e-4,
    )
    assert (torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0) == (option == "torch_compile")


@pytest.mark.parametrize("batches", ["packed", "packed with cu_seqlens"])
def test_packed_batches_train_as_padded_ones(tmp_path, batches):
    torch.testing.assert_close(
        weights_after(tmp_path / "packed", batches), weights_after(tmp_path / "padded"), atol=2e-6, rtol=1e-4
    )


@pytest.mark.parametrize("batches", COLLATORS)
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_the_loss_of_a_batch_is_that_of_its_documents(batches, training):
    model = make_model(spread=0.5).train(training)
    examples = make_examples()
    model.config.use_cache = False
    together = model(**COLLATORS[batches](examples)).loss
    alone = [(model(**pad([example])).loss, len(example["input_ids"]) - 1) for example in examples]
    expected = sum(loss * count for loss, count in alone) / sum(count for _, count in alone)
    torch.testing.assert_close(together, expected, atol=1e-5, rtol=1e-5)


def test_bf16_autocast_computes_the_importance_in_float32(tmp_path):
    model = make_model(spread=0.5)
    seen = []
    gate = model.model.layers[0].self_attn.dma
    gate.register_forward_hook(lambda module, args, importance: seen.append((args[0].dtype, importance.dtype)))
    make_trainer(model, tmp_path, max_steps=1, bf16=True).train()
    assert seen and set(seen) == {(torch.bfloat16, torch.float32)}


@pytest.mark.parametrize("batches", ["padded", "packed"])
def test_bf16_autocast_stays_near_float32(tmp_path, batches):
    def first_loss(**options):
        trainer = make_trainer(make_model(spread=0.5), tmp_path, batches=batches, max_steps=1, **options)
        trainer.train()
        return losses(trainer)[0]

    assert first_loss(bf16=True) == pytest.approx(first_loss(), abs=0.05)


@pytest.mark.parametrize(
    ("batches", "rate", "as_class"),
    [("padded", None, False), ("packed", None, False), ("padded", 3e-2, False), ("padded", 3e-2, True)],
    ids=["padded", "packed", "own rate, optimizer given", "own rate, optimizer class given"],
)
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, batches, rate, as_class):
    def run(folder, resume=None, **options):
        model = make_model()
        trainer = make_trainer(
            model,
            folder,
            batches=batches,
            importance_learning_rate=rate,
            as_class=as_class,
            save_strategy="steps",
            save_steps=3,
            **options,
        )
        trainer.train(resume_from_checkpoint=resume)
        return model, trainer

    whole, whole_trainer = run(tmp_path)
    checkpoint = str(tmp_path / "checkpoint-3")
    resumed, resumed_trainer = run(tmp_path / "resumed", resume=checkpoint)
    assert resumed_trainer.state.global_step == whole_trainer.state.global_step == 8
    assert losses(resumed_trainer) == losses(whole_trainer)
    for (name, expected), (_, got) in zip(whole.named_parameters(), resumed.named_parameters(), strict=True):
        assert torch.equal(got, expected), name


def test_a_trainer_checkpoint_is_an_ordinary_checkpoint(tmp_path):
    model = make_model()
    trainer = make_trainer(model, tmp_path, max_steps=4, save_strategy="steps", save_steps=4)
    trainer.train()
    reloaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-4", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    batch = {key: value for key, value in pad(make_examples()).items() if key != "labels"}
    with torch.no_grad():
        assert torch.equal(reloaded(**batch).logits, model.eval()(**batch).logits)
