"""The stages of a distillation, one after the other on one model."""

import pytest
import torch

from flash_dmattn_hf.integration import attention
from flash_dmattn_hf.training import stages
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
