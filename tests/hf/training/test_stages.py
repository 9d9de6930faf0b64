"""The stages of a distillation, one after the other on one model."""

import pytest
import torch

from flash_dmattn_hf.integration import attention
from flash_dmattn_hf.training import compiled_layers, stages
from flash_dmattn_hf.training.distillation_arguments import DistillationArguments
from flash_dmattn_hf.training.recipe import Recipe

from .distillation_setup import LENGTH, WINDOWS, make_model, text

STEPS = 2
"""Of each stage."""


@pytest.mark.parametrize("lora_rank", [None, 2], ids=["all weights", "adapter"])
def test_every_stage_runs_under_autocast(monkeypatch, tmp_path, lora_rank):
    """The second trained in float32: accelerate adds it to no model that it has prepared before."""
    seen, called = [], attention.dynamic_mask_attention

    def note_dtype(query, key, value, *args, **options):
        if options.get("selection_temperature") is not None:
            seen.append(value.dtype)
        return called(query, key, value, *args, **options)

    def with_bf16(**values):
        return DistillationArguments(**{**values, "bf16": True})  # a stage asks for it on GPUs alone

    monkeypatch.setattr(attention, "dynamic_mask_attention", note_dtype)
    monkeypatch.setattr(stages, "DistillationArguments", with_bf16)
    course = {"steps": 2 * STEPS, "importance_share": 0.5, "evaluations": 0}
    recipe = Recipe(**WINDOWS, length=LENGTH, batch_size=2, lora_rank=lora_rank, **course)
    model = make_model(importance_input="hidden")
    num_layers = model.config.num_hidden_layers
    for stage in stages.STAGES:
        seen.clear()
        model, _ = stages.train_stage(model, stage, recipe, text(), tmp_path / stage)
        assert seen == [torch.bfloat16] * STEPS * num_layers, stage
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert not hasattr(model, "_original_forward")


@pytest.mark.parametrize("lora_rank", [None, 2], ids=["all weights", "adapter"])
def test_compiled_stages_end_with_the_weights_of_others_and_a_plain_model(monkeypatch, tmp_path, lora_rank):
    monkeypatch.setattr(compiled_layers, "BACKEND", "aot_eager")  # a compiler would take minutes
    course = {"steps": 4, "importance_share": 0.5, "evaluations": 0, "save_steps": 1, "lora_rank": lora_rank}
    course["attention_weights"] = {"importance": 1.0, "all": 1.0}
    found, losses, counters = [], [], torch._dynamo.utils.counters
    for name, compiles in (("with", True), ("without", False)):
        torch.compiler.reset()
        counters.clear()
        losses.append([])
        recipe = Recipe(**WINDOWS, length=LENGTH, batch_size=2, compile=compiles, **course)
        model = make_model(importance_input="hidden")
        names = list(model.state_dict())
        for stage in stages.STAGES:
            model, log = stages.train_stage(model, stage, recipe, text(), tmp_path / name / stage)
            losses[-1] += [entry["train_loss"] for entry in log if "train_loss" in entry]
            assert all(module._compiled_call_impl is None for module in model.modules())
        assert type(model).__name__ == "LlamaForCausalLM" and list(model.state_dict()) == names
        assert (counters["stats"]["unique_graphs"] > 0) == compiles
        assert not counters["graph_break"]
        found.append(model.state_dict())
    assert len(losses[0]) == 2 and losses[0] == pytest.approx(losses[1], rel=1e-4)
    torch.testing.assert_close(*found, atol=2e-5, rtol=1e-3)
    kept = [sorted(path.name for path in (tmp_path / name / "all").iterdir()) for name in ("with", "without")]
    assert kept[0] == kept[1]
