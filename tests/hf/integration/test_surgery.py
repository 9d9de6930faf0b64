"""Surgery on a converted model: it generates what it computes without a cache, or says what is wrong with it."""

import copy

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaAttention

from flash_dmattn_hf import DynamicMaskCache, iter_gates

from ..dense_definition import by_definition
from ..generation_models import greedy, make_model, make_prompt

LAYERS = {
    "first_removed": [2, 3, 4, 5],
    "last_removed": [0, 1, 2],
    "inner_removed": [0, 1, 4, 5],
    "every_second": [0, 2, 4],
    "doubled": [0, 1, 2, 3, 2, 3, 4, 5],
    "reversed": [5, 4, 3, 2, 1, 0],
    "one": [3],
}
SLIDING = {"layer_types": ["sliding_attention", "full_attention"] * 3}


def operate(model, picked, *, renumber=True):
    """The model with these of its layers, copied where one comes twice."""
    config, layers = model.config, model.model.layers
    taken = [
        copy.deepcopy(layers[index]) if index in picked[:place] else layers[index] for place, index in enumerate(picked)
    ]
    model.model.layers = nn.ModuleList(taken)
    if renumber:
        config.num_hidden_layers = len(picked)
        if getattr(config, "layer_types", None):
            config.layer_types = [config.layer_types[index] for index in picked]
        for index, layer in enumerate(taken):
            layer.self_attn.layer_idx = index
    return model


def six_layers(kind="llama-sinks-local"):
    extra = SLIDING if "sliding" in kind else {}
    return make_model(kind, num_hidden_layers=6, **extra)


@pytest.mark.parametrize("kind", ["llama-sinks-local", "qwen2-sliding-above-w", "qwen2-sliding-below-w"])
@pytest.mark.parametrize("case", LAYERS)
def test_layers_taken_out_doubled_and_renumbered(case, kind, tmp_path):
    model, (ids, mask) = operate(six_layers(kind), LAYERS[case]), make_prompt(batch=2)
    out = greedy(model, ids, mask, return_dict_in_generate=True)
    assert torch.equal(out.sequences, greedy(model, ids, mask, use_cache=False))
    if case == "doubled":  # a copied layer without a gate has a config of its own, which the definition does not reach
        model.set_attn_implementation("flash_dmattn")
    with torch.no_grad():
        with by_definition(model):
            expected = model(out.sequences, use_cache=False).logits
        logits = model(out.sequences, use_cache=False).logits
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)  # the definition rounds no importance
    if not any(iter_gates(model)):
        return
    cache = out.past_key_values
    assert cache.max_keys == model.config.flash_dmattn["keep_window_size"]
    assert len(cache.mask_layers) == len(list(iter_gates(model)))
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64).eval()
    torch.testing.assert_close(again(ids).logits, model(ids).logits, atol=1e-4, rtol=1e-4)


def test_layers_numbered_alike_are_refused():
    model = operate(six_layers(), [0, 0, 1], renumber=False)
    with pytest.raises(ValueError, match="every layer of model must have a layer_idx of its own, got 0"):
        greedy(model, *make_prompt())
    assert model(make_prompt()[0], use_cache=False).logits.isfinite().all()


def test_more_layers_than_the_config_counts_are_refused():
    model = operate(six_layers(), LAYERS["doubled"])
    cache = DynamicMaskCache(model)
    del cache.layers[6:]  # transformers runs the layers that the config counts when the forward begins
    with pytest.raises(ValueError, match="num_hidden_layers of the model's config must count all layers, got 6"):
        model(make_prompt()[0], past_key_values=cache)


def test_layers_that_do_not_begin_at_zero_are_refused():
    model = operate(six_layers(), LAYERS["first_removed"], renumber=False)
    with pytest.raises(ValueError, match="layer_idx of a model's layers must begin at 0"):
        greedy(model, *make_prompt())


def test_one_module_in_two_places_is_refused():
    model = six_layers()
    model.model.layers[1] = model.model.layers[0]
    with pytest.raises(ValueError, match="model.layers of model must not hold a module twice"):
        greedy(model, *make_prompt())


def test_a_module_that_was_put_in_without_a_gate_is_refused():
    model, (ids, mask) = make_model("llama-sinks-local"), make_prompt()
    model(ids)
    fresh = LlamaAttention(model.config, 1).double().eval()
    fresh.load_state_dict(model.model.layers[1].self_attn.state_dict(), strict=False)
    model.model.layers[1].self_attn = fresh
    with pytest.raises(ValueError, match=r"layer 1 \(LlamaAttention\) must have an importance gate"):
        model(ids)
    model.set_attn_implementation("flash_dmattn")
    assert torch.equal(greedy(model, ids, mask), greedy(model, ids, mask, use_cache=False))


def test_a_module_of_another_converted_model():
    model, other = make_model("llama-sinks-local"), make_model("llama-sinks-local", seed=1)
    (ids, mask), before = make_prompt(), greedy(other, *make_prompt())
    model.model.layers[1].self_attn = other.model.layers[1].self_attn
    assert torch.equal(greedy(model, ids, mask), greedy(model, ids, mask, use_cache=False))
    assert torch.equal(greedy(other, ids, mask), before)


@pytest.mark.parametrize("kind", ["llama-sinks-local", "llama-query-heads", "doge"])
def test_the_average_of_two_models(kind):
    """Its weights are read anew: nothing of the gates is kept beside their state dict."""
    model, other, third = make_model(kind), make_model(kind, seed=1), make_model(kind, seed=2)
    states = model.state_dict(), other.state_dict()
    model.load_state_dict({name: (states[0][name] + states[1][name]) / 2 for name in states[0]})
    third.load_state_dict(model.state_dict())
    ids, mask = make_prompt()
    with torch.no_grad():
        assert torch.equal(model(ids).logits, third(ids).logits)
    assert torch.equal(greedy(model, ids, mask), greedy(model, ids, mask, use_cache=False))


EDITS = {
    "replaced": lambda section: {**section, "keep_window_size": 20, "local_window_size": 9},
    "partial": lambda section: {"keep_window_size": 20},
    "without_a_window": lambda section: {"num_sink_tokens": 2},
    "in_place": lambda section: section.update(keep_window_size=20, num_sink_tokens=1),
    "no_bias": lambda section: section.update(add_importance_bias=False),
    "form": lambda section: section.update(importance="zoh"),
}


@pytest.mark.parametrize("order", ["run_first", "save_first", "set_first"])
@pytest.mark.parametrize("edit", EDITS)
def test_an_edit_of_the_config_takes_effect_and_is_what_is_saved(edit, order, tmp_path):
    model, (ids, _) = make_model("llama-sinks-local"), make_prompt(length=60)
    model(ids)
    before = model(ids).logits
    if (section := EDITS[edit](model.config.flash_dmattn)) is not None:
        model.config.flash_dmattn = section
    if order == "run_first":
        model(ids)
    if order == "set_first":
        model.set_attn_implementation("flash_dmattn")
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64).eval()
    logits = model(ids).logits
    assert not torch.allclose(logits, before)
    assert torch.equal(logits, again(ids).logits)
    assert model.config.flash_dmattn == again.config.flash_dmattn
    assert DynamicMaskCache(model).mask_layers[0].windows == next(iter_gates(again))[2].windows


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@pytest.mark.parametrize("edit", EDITS)
def test_an_edit_between_two_tokens_is_refused_by_their_cache(edit, static):
    model, (ids, _) = make_model("llama-sinks-local"), make_prompt()
    cache = DynamicMaskCache(model, static=static)
    with torch.no_grad():
        model(ids, past_key_values=cache)
        if (section := EDITS[edit](model.config.flash_dmattn)) is not None:
            model.config.flash_dmattn = section
        with pytest.raises(ValueError, match="settings of layer 0 must be {.*, as when this DynamicMaskCache took"):
            model(ids[:, :1], past_key_values=cache)
        cache.reset()
        assert torch.equal(model(ids, past_key_values=cache).logits, model(ids, use_cache=False).logits)


REFUSED = {
    "heads": ({"importance_heads": "query"}, "'importance_heads'.* must stay 'kv', got 'query'"),
    "bias": ({"dt_proj_bias": True}, "must stay False, got True"),
    "layers": ({"layers": [1]}, "must want a gate in layer 0, which has one"),
    "unknown": ({"keep_windows": 3}, "must only have the keys"),
    "too_large": ({"num_sink_tokens": 99}, "must not exceed keep_window_size"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_edits_that_do_not_fit_are_refused(case):
    values, sentence = REFUSED[case]
    model, (ids, _) = make_model("llama-sinks-local"), make_prompt()
    section = model.config.flash_dmattn
    expected = model(ids).logits
    model.config.flash_dmattn = {**section, **values}
    for _ in range(2):
        with pytest.raises(ValueError, match=sentence):
            model(ids)
    model.config.flash_dmattn = section
    assert torch.equal(model(ids).logits, expected)


def test_settings_that_are_taken_away_are_missed():
    model, (ids, _) = make_model("llama-sinks-local"), make_prompt()
    model.config.flash_dmattn = None
    with pytest.raises(ValueError, match="must hold the settings of a model with importance gates, got None"):
        model(ids)


def test_a_window_that_would_need_other_gates_is_refused():
    model, (ids, _) = make_model("qwen2-sliding-above-w"), make_prompt()
    model.config.flash_dmattn["keep_window_size"] = 18
    with pytest.raises(ValueError, match="must want a gate in layer 0, which has one"):
        model(ids)
