"""A recipe is checked as a whole, and the files in configs are recipes."""

import json
from pathlib import Path

import pytest
import yaml

from flash_dmattn_hf.training.recipe import STAGES, Recipe

CONFIGS = Path(__file__).resolve().parents[3] / "configs"


def from_file(name):
    return Recipe.from_dict(yaml.safe_load((CONFIGS / name).read_text()), name)


def test_the_file_of_the_whole_recipe_has_the_defaults():
    assert from_file("distill.yaml") == Recipe()


def test_the_file_for_the_importance_alone_differs_in_stages():
    assert from_file("distill_importance.yaml") == Recipe(stages=("importance",))


def test_a_quarter_of_the_window_is_local_and_dt_proj_has_a_bias():
    mask = Recipe(keep_window_size=200).mask()
    assert (mask.local_window_size, mask.num_sink_tokens, mask.dt_proj_bias) == (50, 4, True)
    assert mask.add_importance_bias is False and Recipe(local_window_size=7).mask().local_window_size == 7


def test_limits_are_shared_between_the_stages():
    assert Recipe().limit_of("importance") == {"max_minutes": 2.0}
    assert Recipe().limit_of("all") == {"max_minutes": 18.0}
    assert Recipe(steps=50).limit_of("importance") == {"max_steps": 5}
    assert Recipe(steps=50).limit_of("all") == {"max_steps": 45}
    for steps in range(2, 40):  # halves are not rounded up, or down, twice
        assert sum(Recipe(steps=steps).limit_of(stage)["max_steps"] for stage in STAGES) == steps
    assert Recipe(steps=2, importance_share=0.9).limit_of("all") == {"max_steps": 1}
    assert Recipe(stages=("all",), minutes=3.0).limit_of("all") == {"max_minutes": 3.0}
    assert Recipe(stages=("importance",), steps=9).limit_of("importance") == {"max_steps": 9}


def test_one_stage_of_a_mapping_leaves_the_other_at_its_default():
    recipe = Recipe(gate_learning_rates={"all": 1e-3})
    assert recipe.gate_learning_rates == {"importance": 1e-2, "all": 1e-3}


WRONG = {
    "keep_window_size": (0, "keep_window_size must be an integer of at least 1, got 0"),
    "length": (513, r"length must be at least keep_window_size \+ 2 = 514, .* got 513"),
    "batch_size": (2.5, "batch_size must be an integer of at least 1, got 2.5"),
    "minutes": (0, "minutes must be a number above 0, got 0"),
    "learning_rate": ("5e-5", "learning_rate must be a number above 0, got '5e-5'"),
    "seed": (-1, r"seed must be an integer from 0 to 2\*\*32 - 1, got -1"),
    "tasks": ("pass_key", "tasks must be a list of names, got 'pass_key'"),
    "stages": (["all", "importance"], r"stages must be one or both of \['importance', 'all'\], in this order"),
    "importance_share": (1, "importance_share must be at least 0 and below 1, got 1"),
    "hard_share": (-0.1, "hard_share must be at least 0 and below 1, got -0.1"),
    "gate_learning_rates": ({"all": 0.0}, "gate_learning_rates must be numbers above 0, got 0.0"),
    "temperatures": ({"all": [0.3, 0.0]}, "temperatures must be a first and a last one above 0 for each stage"),
    "attention_weights": ({"all": -0.5}, "attention_weights must be numbers of at least 0, got -0.5"),
    "answer_weight": (0, "answer_weight must be a number above 0, got 0"),
    "selection_band": (0.5, "selection_band must be None or at least 1, got 0.5"),
    "importance_input": ("keys", "importance_input must be one of"),
    "add_importance_bias": (1, "add_importance_bias must be true or false, got 1"),
    "local_window_size": (510, r"num_sink_tokens \+ local_window_size must not exceed keep_window_size"),
    "window_shares": ({17: 0}, "window_shares must be finite numbers above 0, got 0 for layer 17"),
    "colour": (1, r"recipe must only have the names .*, got \['colour'\]"),
}


@pytest.mark.parametrize(("name", "value", "sentence"), [(name, *rest) for name, rest in WRONG.items()])
def test_values_out_of_range_are_refused(name, value, sentence):
    with pytest.raises(ValueError, match=sentence):
        Recipe.from_dict({name: value}, "recipe")


def test_windows_of_single_layers_are_those_of_the_mask():
    recipe = Recipe.from_dict(yaml.safe_load("window_shares: {17: 2.5, 18: 0.5}"), "recipe")
    assert recipe.mask().window_shares == {17: 2.5, 18: 0.5} == recipe.window_shares
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict())), "recipe") == recipe
    assert "window_shares" not in Recipe().to_dict()  # results of before have none
    with pytest.raises(ValueError, match="length must be at least 1282, .* 1280 keys, got 1281"):
        Recipe(window_shares={17: 2.5}, length=1281)
    with pytest.raises(ValueError, match="got 0.25 .* = 128 for layer 17"):
        Recipe(window_shares={17: 0.25})
    full = {"keep_window_size": 16, "num_sink_tokens": 4, "local_window_size": 12}
    Recipe(**full, window_shares={17: 1.25})  # this layer keeps keys for their importance
    with pytest.raises(ValueError, match="with the stage importance: no key"):
        Recipe(**full, window_shares={17: 1.0})


def test_what_does_not_go_together_is_refused():
    with pytest.raises(ValueError, match="minutes or steps must be given, got both: 2 and 3"):
        Recipe(minutes=2, steps=3)
    with pytest.raises(ValueError, match="lora_rank needs the stage all"):
        Recipe(stages=("importance",), lora_rank=4)
    with pytest.raises(ValueError, match="steps must be at least 2, one for each stage, got 1"):
        Recipe(steps=1)
    with pytest.raises(ValueError, match="below keep_window_size = 16 with the stage importance: no key"):
        Recipe(keep_window_size=16, num_sink_tokens=4, local_window_size=12)
    Recipe(keep_window_size=16, num_sink_tokens=4, local_window_size=12, stages=("all",))
    Recipe(keep_window_size=16, num_sink_tokens=4, local_window_size=12, add_importance_bias=True)
    with pytest.raises(ValueError, match="hard_share must be 0 with the stage importance alone, got 0.5"):
        Recipe(stages=("importance",), hard_share=0.5)
    Recipe(stages=("importance",), hard_share=0.5, add_importance_bias=True)
    with pytest.raises(ValueError, match="learning_rate must be a number above 0, got None"):
        Recipe(learning_rate=None)
    with pytest.raises(ValueError, match=r"stages must be one or both of .*, got None"):
        Recipe(stages=None)
    with pytest.raises(ValueError, match="importance_share must be above 0"):
        Recipe(importance_share=0.0)
    with pytest.raises(ValueError, match="recipe must hold a mapping, got list"):
        Recipe.from_dict([1], "recipe")
