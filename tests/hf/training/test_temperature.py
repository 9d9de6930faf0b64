"""Soft training with an unmodified Trainer: the temperature follows its schedule, and the importance learns."""

import pytest
import torch

from flash_dmattn_hf import soft_selection
from flash_dmattn_hf.training import (
    TemperatureCallback,
    freeze_all_but_importance,
    geometric_schedule,
    importance_parameters,
)

from .trainer_setup import losses, make_model, make_trainer


def test_a_geometric_schedule_is_the_formula():
    schedule = geometric_schedule(1.0, 0.05)
    assert [schedule(done) for done in (0, 0.5, 1)] == pytest.approx([1.0, 0.05**0.5, 0.05])


@pytest.mark.parametrize("ends, name", [((0, 1), "start"), ((1, 0), "end"), ((1, float("nan")), "end")])
def test_a_schedule_is_refused(ends, name):
    with pytest.raises(ValueError, match=f"^{name} must be above 0, got"):
        geometric_schedule(*ends)


@pytest.mark.parametrize("options", [{}, {"gradient_checkpointing": True}], ids=["plain", "gradient checkpointing"])
@pytest.mark.parametrize("add_importance_bias", [True, False], ids=["bias", "no bias"])
def test_a_trainer_trains_the_importance_through_the_cut(tmp_path, add_importance_bias, options):
    model = make_model(spread=0.3, add_importance_bias=add_importance_bias)
    with soft_selection(model, temperature=1.0) as soft:
        freeze_all_but_importance(model)
        before = {name: parameter.clone() for name, parameter in importance_parameters(model)}
        callback = TemperatureCallback(soft, geometric_schedule(1.0, 0.1))
        trainer = make_trainer(
            model, tmp_path, importance_learning_rate=0.05, callbacks=[callback], max_steps=17, **options
        )
        trainer.train()
    history = losses(trainer)
    assert sum(history[-4:]) < sum(history[:4])
    assert not any(torch.equal(parameter, before[name]) for name, parameter in importance_parameters(model))
    found = [entry["dma/temperature"] for entry in trainer.state.log_history if "loss" in entry]
    assert found == pytest.approx([10 ** (-step / 16) for step in range(17)])
