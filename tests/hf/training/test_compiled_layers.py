"""Layers compiled one by one: one graph for all, the same results, and nothing is left behind."""

import copy

import pytest
import torch
from transformers.modeling_layers import GradientCheckpointingLayer

from flash_dmattn_hf import soft_selection
from flash_dmattn_hf.conversion.variants import dense_switch
from flash_dmattn_hf.training import compiled_layers as module
from flash_dmattn_hf.training import stages
from flash_dmattn_hf.training.compiled_layers import compiled_layers
from flash_dmattn_hf.training.recipe import Recipe

from .distillation_setup import LENGTH, WINDOWS, log_of, make_model, make_trainer, text

COUNTERS = torch._dynamo.utils.counters


@pytest.fixture(autouse=True)
def interpreter(monkeypatch):
    monkeypatch.setattr(module, "BACKEND", "aot_eager")
    torch.compiler.reset()
    COUNTERS.clear()


def called_model():
    model = make_model(importance_input="hidden")
    with torch.no_grad():
        model(input_ids=text()[:LENGTH][None], use_cache=False)
    return model


def test_all_layers_and_temperatures_share_a_graph():
    model, input_ids = called_model(), text()[: 2 * LENGTH].view(2, LENGTH)
    plain, densely = copy.deepcopy(model), dense_switch(model)
    with compiled_layers(model) as layers, soft_selection(model, temperature=0.3) as soft:
        assert len(layers) == model.config.num_hidden_layers > 1
        for temperature in (0.3, 0.1, 0.02):
            soft.temperature = temperature
            found = model(input_ids=input_ids, use_cache=False).logits
            with soft_selection(plain, temperature=temperature):
                expected = plain(input_ids=input_ids, use_cache=False).logits
                expected.square().mean().backward()
            found.square().mean().backward()
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
            assert COUNTERS["stats"]["unique_graphs"] == 1 and not COUNTERS["graph_break"]
        for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-5, rtol=1e-3)
        with densely(), torch.no_grad():
            found = model(input_ids=input_ids, use_cache=False).logits
        assert COUNTERS["stats"]["unique_graphs"] == 2
    with dense_switch(plain)(), torch.no_grad():
        torch.testing.assert_close(found, plain(input_ids=input_ids, use_cache=False).logits, atol=1e-5, rtol=1e-4)
    for _ in range(2):  # the hard mask again, compiled and not
        with torch.no_grad(), compiled_layers(model):
            found = model(input_ids=input_ids, use_cache=False).logits
        torch.testing.assert_close(found, plain(input_ids=input_ids, use_cache=False).logits, atol=1e-5, rtol=1e-4)


def test_layers_are_as_before_after_an_error():
    model = called_model()
    names = list(model.state_dict())
    with pytest.raises(RuntimeError, match="on purpose"), compiled_layers(model, model) as layers:
        assert all(layer._compiled_call_impl is not None for layer in layers)
        assert list(model.state_dict()) == names
        raise RuntimeError("on purpose")
    assert layers and all(layer._compiled_call_impl is None for layer in layers)


CHECKPOINTS_OUTSIDE = "__call__" in vars(GradientCheckpointingLayer)
"""Whether this transformers checkpoints around what is compiled."""


@pytest.mark.parametrize(
    "options",
    [
        {"hard_share": 0.5},
        pytest.param(
            {"gradient_checkpointing": True},
            marks=pytest.mark.skipif(CHECKPOINTS_OUTSIDE, reason="refused with this transformers, as tested below"),
        ),
    ],
    ids=["hard", "checkpoints"],
)
def test_a_run_has_the_losses_of_the_same_run_without(options, tmp_path):
    losses = []
    for compiles in (True, False):
        trainer = make_trainer(make_model(importance_input="hidden"), tmp_path, compile_layers=compiles, **options)
        trainer.train()
        losses.append(log_of(trainer, "loss"))
    assert losses[0] == pytest.approx(losses[1], rel=1e-3) and len(losses[0]) == 8
    assert COUNTERS["stats"]["unique_graphs"] <= 6


def test_checkpoints_around_compiled_layers_are_refused(monkeypatch, tmp_path):
    if not CHECKPOINTS_OUTSIDE:
        monkeypatch.setattr(GradientCheckpointingLayer, "__call__", torch.nn.Module.__call__, raising=False)
    recipe = Recipe(**WINDOWS, length=LENGTH, compile=True, gradient_checkpointing=True)
    with pytest.raises(ImportError, match="need a transformers whose layers checkpoint inside of their forward"):
        stages.check_packages(recipe)
    with pytest.raises(ImportError, match="leave one of the two out"):
        make_trainer(make_model(), tmp_path, compile_layers=True, gradient_checkpointing=True)
    enabled = make_model()
    enabled.gradient_checkpointing_enable()
    with pytest.raises(ImportError, match="leave one of the two out"):
        make_trainer(enabled, tmp_path, compile_layers=True)


def test_a_compiled_run_goes_on_from_a_checkpoint(tmp_path):
    whole = make_trainer(
        make_model(importance_input="hidden"), tmp_path, save_strategy="steps", save_steps=4, compile_layers=True
    )
    whole.train()
    rest = make_trainer(make_model(importance_input="hidden"), tmp_path, compile_layers=True)
    rest.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert log_of(rest, "loss")[-4:] == pytest.approx(log_of(whole, "loss")[-4:], rel=1e-3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU: inductor's kernels")
def test_the_compiler_trains_as_the_plain_layers_do_in_bfloat16(monkeypatch, tmp_path):
    monkeypatch.setattr(module, "BACKEND", "inductor")
    losses = []
    for compiles in (True, False):
        recipe = Recipe(**WINDOWS, length=LENGTH, batch_size=2, steps=8, evaluations=0, compile=compiles)
        model = make_model(importance_input="hidden").cuda()
        losses.append([])
        for stage in stages.STAGES:
            model, log = stages.train_stage(model, stage, recipe, text(), tmp_path / str(compiles) / stage)
            losses[-1] += [entry["train_loss"] for entry in log if "train_loss" in entry]
    assert losses[0] == pytest.approx(losses[1], rel=5e-2)
