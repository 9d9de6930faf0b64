"""All layers of a model run by its one config, whatever their modules came from, and that is what is saved."""

import copy

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from flash_dmattn_hf import DynamicMaskCache, DynamicMaskConfig, convert_model, iter_gates

from ..dense_definition import by_definition
from ..generation_models import greedy, make_model, make_prompt

KIND = "llama-sinks-local"
WIDER = {"keep_window_size": 24, "num_sink_tokens": 2, "local_window_size": 6}


def double(model):
    """The model with a copy of its last layer behind it."""
    layers = list(model.model.layers)
    model.model.layers = nn.ModuleList([*layers, copy.deepcopy(layers[-1])])
    model.config.num_hidden_layers = len(layers) + 1
    model.model.layers[-1].self_attn.layer_idx = len(layers)
    return model


def agrees_with_the_definition(model):
    ids, mask = make_prompt(batch=2, length=40)
    with torch.no_grad():
        logits = model(ids, use_cache=False).logits
        with by_definition(model):
            torch.testing.assert_close(logits, model(ids, use_cache=False).logits, atol=1e-4, rtol=1e-4)
    return torch.equal(greedy(model, ids, mask), greedy(model, ids, mask, use_cache=False))


def test_a_copied_layer_follows_the_config_of_its_model():
    model = double(make_model(KIND))
    assert agrees_with_the_definition(model)
    model.config.flash_dmattn = {**model.config.flash_dmattn, **WIDER}
    assert {gate.windows.keep_window_size for _, _, gate in iter_gates(model)} == {24}
    assert agrees_with_the_definition(model)


def test_a_copied_model_has_a_config_of_its_own():
    model = make_model(KIND)
    copied = copy.deepcopy(model)
    copied.config.flash_dmattn = {**copied.config.flash_dmattn, **WIDER}
    for one, window in ((model, 16), (copied, 24)):
        assert {gate.windows.keep_window_size for _, _, gate in iter_gates(one)} == {window}
        assert agrees_with_the_definition(one)


def test_a_copied_layer_of_a_dense_model_is_converted_like_the_others():
    model = double(make_model(KIND, implementation="sdpa"))
    ids, _ = make_prompt(batch=2, length=40)
    dense = model(ids).logits
    convert_model(model, DynamicMaskConfig(**WIDER))
    assert len(list(iter_gates(model))) == len(model.model.layers)
    assert agrees_with_the_definition(model)
    model.set_attn_implementation("sdpa")
    torch.testing.assert_close(model(ids).logits, dense)


def exchange_layer(model):
    model.model.layers[1] = make_model(KIND, seed=1).model.layers[1]


def exchange_config(model):
    model.config = model.model.config = copy.deepcopy(model.config)


@pytest.mark.parametrize("surgery", [exchange_layer, exchange_config])
def test_layers_with_other_settings_are_refused_until_they_are_chosen_anew(surgery, tmp_path):
    model, (ids, mask) = make_model(KIND), make_prompt(batch=2, length=40)
    surgery(model)
    assert torch.equal(greedy(model, ids, mask), greedy(model, ids, mask, use_cache=False))  # with equal settings
    model.config.flash_dmattn = {**model.config.flash_dmattn, **WIDER}
    sentence = "must have {'keep_window_size': 24.*, as the config of its model says, got"
    for use in (DynamicMaskCache, lambda _: greedy(model, ids, mask), lambda _: model.save_pretrained(tmp_path)):
        with pytest.raises(ValueError, match=sentence):
            use(model)
    model.set_attn_implementation("flash_dmattn")
    assert agrees_with_the_definition(model)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64).eval()
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_a_section_means_the_same_with_and_without_its_defaults():
    model, other = make_model(KIND), make_model(KIND)
    model.model.layers[0] = other.model.layers[0]
    model.config.flash_dmattn = DynamicMaskConfig(**model.config.flash_dmattn).chosen()
    assert len(model.config.flash_dmattn) < len(other.config.flash_dmattn)
    DynamicMaskCache(model)
    model.config.flash_dmattn = WIDER
    with pytest.raises(ValueError, match=r"must have \{'keep_window_size': 24, .*, got \{'keep_window_size': 16"):
        DynamicMaskCache(model)


def test_a_checkpoint_may_have_more_layers_than_the_model(tmp_path):
    model, (ids, _) = make_model(KIND), make_prompt(length=40)
    model.save_pretrained(tmp_path)
    fewer = AutoModelForCausalLM.from_pretrained(tmp_path, num_hidden_layers=1, dtype=torch.float64).eval()
    model.model.layers = model.model.layers[:1]
    assert torch.equal(fewer(ids, use_cache=False).logits, model(ids, use_cache=False).logits)
