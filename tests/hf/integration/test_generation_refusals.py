"""What cannot be right with a cache that evicts is refused in one sentence; other models are left alone."""

import pytest
import torch
from transformers import DynamicCache, GenerationMixin, PreTrainedModel, StaticCache
from transformers.cache_utils import DynamicSlidingWindowLayer, QuantizedCache

import flash_dmattn_hf
from flash_dmattn_hf.cache.cache import DynamicMaskCache
from flash_dmattn_hf.integration import generation

from ..generation_models import NEW, greedy, make_model, make_prompt


@pytest.fixture(scope="module")
def model():
    return make_model("llama-sinks-local")


@pytest.fixture(scope="module")
def dense():
    return make_model("llama-sinks-local", implementation="sdpa")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("offloaded_static", "evicting needs the keys on the device"),
        ("quantized", "keys and values in 8 bits are cache_config="),
        ("offloaded", "evicting needs the keys on the device"),
    ],
)
def test_other_cache_implementations(model, name, reason):
    message = rf"cache_implementation must be None, 'dynamic' or 'static' with flash_dmattn, got '{name}': {reason}"
    with pytest.raises(ValueError, match=message):
        greedy(model, *make_prompt(), cache_implementation=name)


def test_an_implementation_in_the_models_own_generation_config():
    model = make_model("llama-sinks-local")
    model.generation_config.cache_implementation = "quantized"
    with pytest.raises(ValueError, match="cache_implementation must be None, 'dynamic' or 'static'"):
        greedy(model, *make_prompt())


def test_dynamic_is_ours(model):
    result = greedy(model, *make_prompt(), cache_implementation="dynamic", return_dict_in_generate=True)
    assert isinstance(result.past_key_values, DynamicMaskCache)


def test_a_static_cache_object(model):
    past = StaticCache(config=model.config, max_cache_len=64)
    with pytest.raises(ValueError, match="past_key_values must be a DynamicMaskCache .* got a StaticCache"):
        greedy(model, *make_prompt(), past_key_values=past)


def test_a_static_cache_in_a_forward(model):
    ids, _ = make_prompt()
    with pytest.raises(ValueError, match="static cache"), torch.no_grad():
        model(ids, past_key_values=StaticCache(config=model.config, max_cache_len=64))


def test_a_quantized_cache_object(model):
    past = QuantizedCache.__new__(QuantizedCache)  # its backends are not installed
    past.layers, past.offloading = [], False
    with pytest.raises(ValueError, match="past_key_values must be a DynamicMaskCache .* got a QuantizedCache"):
        greedy(model, *make_prompt(), past_key_values=past)


def test_the_cache_of_another_model(model):
    past = DynamicMaskCache(make_model("llama-sinks-local", seed=1))
    with pytest.raises(ValueError, match="past_key_values must be a DynamicMaskCache of this very model"):
        greedy(model, *make_prompt(), past_key_values=past)


def test_a_dynamic_cache_that_drops_keys():
    """One that was made before flash_dmattn was chosen has layers that forget what still competes."""
    model = make_model("qwen2-sliding-above-w")
    past = DynamicCache(config=model.config)
    past.layers[0] = DynamicSlidingWindowLayer(sliding_window=18)
    with pytest.raises(ValueError, match="past_key_values must keep all keys of layer 0"):
        greedy(model, *make_prompt(), past_key_values=past)
    ids, _ = make_prompt()
    with pytest.raises(ValueError, match="dropped .* keys that still compete"), torch.no_grad():
        model(ids, past_key_values=past)
        model(ids[:, :1], past_key_values=past)


def test_continuous_batching_of_an_old_transformers(model, monkeypatch):
    monkeypatch.setattr(generation, "can_serve", lambda: False)
    message = "continuous batching with flash_dmattn needs transformers 5.23.0 or newer, got .* call model.generate"
    prompts = make_prompt(batch=2)[0].tolist()
    with pytest.raises(ValueError, match=message):
        model.generate_batch(inputs=prompts)
    with pytest.raises(ValueError, match=message):
        model.init_continuous_batching()
    with pytest.raises(ValueError, match=message), model.continuous_batching_context_manager():
        pass
    with pytest.raises(ValueError, match=message):
        greedy(model, *make_prompt(), cache_implementation="paged")




def test_a_model_without_gates_has_no_such_cache(dense):
    with pytest.raises(ValueError, match="model must have flash_dmattn attached, got a LlamaForCausalLM"):
        DynamicMaskCache(dense)


@pytest.mark.parametrize("name", [None, "static"])
def test_dense_models_generate_as_before(dense, name):
    ids, mask = make_prompt()
    result = greedy(dense, ids, mask, cache_implementation=name, return_dict_in_generate=True, disable_compile=True)
    assert type(result.past_key_values) is (DynamicCache if name is None else StaticCache)


def test_a_dense_sliding_cache_still_slides():
    dense = make_model("qwen2-sliding-above-w", implementation="sdpa")
    past = greedy(dense, *make_prompt(), return_dict_in_generate=True).past_key_values
    assert isinstance(past.layers[0], DynamicSlidingWindowLayer)


def test_a_converted_model_that_runs_densely_uses_a_plain_cache():
    model = make_model("llama-sinks-local")
    model.set_attn_implementation("sdpa")
    result = greedy(model, *make_prompt(), return_dict_in_generate=True)
    assert type(result.past_key_values) is DynamicCache
    model.set_attn_implementation("flash_dmattn")
    result = greedy(model, *make_prompt(), return_dict_in_generate=True)
    assert isinstance(result.past_key_values, DynamicMaskCache)


def test_dense_attention_over_our_cache_is_an_error():
    """At once: the second layer finds that the first was never attended to."""
    model = make_model("llama-sinks-local")
    past, (ids, _) = DynamicMaskCache(model), make_prompt()
    model.set_attn_implementation("sdpa")
    with pytest.raises(RuntimeError, match="never attended to by flash_dmattn"), torch.no_grad():
        model(ids, past_key_values=past)


def test_a_forward_with_the_cache_of_another_model_is_an_error(model):
    other = make_model("llama-sinks-local", seed=1)
    past, (ids, _) = DynamicMaskCache(model), make_prompt()
    with torch.no_grad():
        model(ids, past_key_values=past)
        with pytest.raises(RuntimeError, match="model is not the one the cache was made for"):
            other(ids[:, :1], past_key_values=past)
        past.reset()
        model(ids, past_key_values=past)


def test_unregister_restores_generation(dense):
    patched = [
        (GenerationMixin, "_prepare_cache_for_generation"),
        (GenerationMixin, "_assisted_decoding"),
        (GenerationMixin, "init_continuous_batching"),
        (PreTrainedModel, "get_compiled_call"),
        (DynamicCache, "__init__"),
    ]
    wrappers = [getattr(owner, name) for owner, name in patched]
    flash_dmattn_hf.unregister()
    try:
        for wrapper, (owner, name) in zip(wrappers, patched, strict=True):
            assert getattr(owner, name) is wrapper.__wrapped__
        assert greedy(dense, *make_prompt()).shape[1] == make_prompt()[0].shape[1] + NEW
    finally:
        flash_dmattn_hf.register()
