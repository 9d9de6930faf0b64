"""Caches that libraries move, models drop and users forget: moved, taken up again, or said in a sentence."""

import copy
import inspect
import io
import pickle
import warnings

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from transformers import DynamicCache, Phi3Config, Phi3ForCausalLM

from flash_dmattn_hf import DynamicMaskCache, dynamic_mask_config, iter_gates
from flash_dmattn_hf.integration import masks

from ..generation_models import greedy, left_padded_prompt, make_model, make_prompt

CPU = torch.device("cpu")
PLACES = {
    "cpu_offload": lambda model, folder: cpu_offload(model, execution_device=CPU, offload_buffers=True),
    "disk_offload": lambda model, folder: disk_offload(model, folder, execution_device=CPU),
    "dispatch": lambda model, folder: dispatch_model(
        model, {"model": "cpu", "lm_head": "disk"}, main_device=CPU, offload_dir=folder, force_hooks=True
    ),
}


@pytest.mark.parametrize("kind", ["llama-sinks-local", "qwen2-sliding-below-w"])
@pytest.mark.parametrize("place", PLACES)
def test_hooks_of_accelerate_move_the_cache(place, kind, tmp_path):
    model, (ids, mask) = make_model(kind), left_padded_prompt()
    expected = greedy(model, ids, mask)
    model = PLACES[place](model, tmp_path)
    for options in ({}, {"past_key_values": DynamicMaskCache(model)}):
        assert torch.equal(greedy(model, ids, mask, **options), expected)


@pytest.mark.parametrize("device", [None, "cpu", CPU])
@pytest.mark.parametrize("options", [{}, {"non_blocking": True}], ids=["blocking", "non_blocking"])
def test_moving_a_cache_to_where_it_is_changes_nothing(device, options):
    model, (ids, mask) = make_model("qwen2-sliding-below-w"), make_prompt()
    cache = DynamicMaskCache(model)
    assert cache.to(device, **options) is cache
    with torch.no_grad():
        model(ids, attention_mask=mask, past_key_values=cache)
    before = copy.deepcopy(cache.state_dict())
    assert cache.to(device, **options).to() is cache
    for layer, saved in zip(cache.layers, before["layers"], strict=True):
        for name, tensor in saved["tensors"].items():
            assert torch.equal(getattr(layer, name), tensor)


def test_a_cache_cannot_be_pickled_and_says_what_can():
    cache = DynamicMaskCache(make_model("llama-topk"))
    for save in (pickle.dumps, lambda cache: torch.save(cache, io.BytesIO())):
        with pytest.raises(TypeError, match=r"cannot be pickled.*save its state_dict\(\)"):
            save(cache)


@torch.no_grad()
def test_a_cache_cannot_be_taken_apart_into_keys_and_values():
    """Libraries make caches of such pairs, whose tokens would then be counted, placed and ranked anew."""
    model = make_model("llama-topk")
    cache = DynamicMaskCache(model)
    model(make_prompt()[0], past_key_values=cache)
    for take in (list, DynamicCache, lambda cache: [keys for keys, *_ in cache]):
        with pytest.raises(TypeError, match=r"cannot be taken apart.*save its state_dict\(\)"):
            take(cache)


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy])
@torch.no_grad()
def test_a_cache_can_be_copied(duplicate):
    model, (ids, _) = make_model("llama-topk"), make_prompt()
    cache = DynamicMaskCache(model)
    model(ids, past_key_values=cache)
    copied = duplicate(cache)
    assert copied.belongs_to(model) and copied.get_seq_length() == ids.shape[1]
    assert (copied.layers[0] is cache.layers[0]) is (duplicate is copy.copy)
    model(ids[:, :1], past_key_values=copied)
    assert cache.get_seq_length() == ids.shape[1] + (duplicate is copy.copy)


def make_longrope(switch=32, **settings):
    """A Phi3 that drops its cache when it has seen `switch` tokens, and processes all of them with other angles."""
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [2.0, 3.0, 4.0, 5.0]}
    rope |= {"original_max_position_embeddings": switch, "partial_rotary_factor": 1.0}
    sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2}
    ids = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": None}
    torch.manual_seed(0)
    config = Phi3Config(
        **sizes, **ids, rope_parameters=rope, max_position_embeddings=256, original_max_position_embeddings=switch
    )
    with dynamic_mask_config(keep_window_size=12, num_sink_tokens=2, local_window_size=3, **settings):
        model = Phi3ForCausalLM._from_config(config, attn_implementation="flash_dmattn")
    for _, _, gate in iter_gates(model):
        torch.nn.init.normal_(gate.A)
        torch.nn.init.normal_(gate.dt_proj.weight, std=0.5)
    return model.double().eval()


DROPS_WHOLLY = "next_sequence_length" in inspect.getsource(Phi3ForCausalLM.prepare_inputs_for_generation)
WAYS = {
    "greedy": {},
    "static": {"cache_implementation": "static"},
    "beams": {"num_beams": 3},
    "lookup": {"prompt_lookup_num_tokens": 3},
}


@pytest.mark.skipif(not DROPS_WHOLLY, reason="this version drops the tokens with the cache")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("batch", [1, 3])
def test_a_cache_that_the_model_drops_is_taken_up_again(way, batch):
    if way == "lookup" and batch > 1:
        pytest.skip("prompt lookup takes one prompt")
    model, (ids, mask) = make_longrope(), left_padded_prompt() if batch > 1 else make_prompt()
    out = greedy(model, ids, mask, new=20, return_dict_in_generate=True, **WAYS[way])
    # Candidates reach the switch earlier, with whatever cache.
    whole = {"past_key_values": DynamicCache()} if way == "lookup" else {"use_cache": False}
    others = {name: value for name, value in WAYS[way].items() if name != "cache_implementation"}
    assert torch.equal(out.sequences, greedy(model, ids, mask, new=20, **whole, **others))
    assert isinstance(out.past_key_values, DynamicMaskCache) and out.past_key_values.max_keys == 12
    assert out.past_key_values.get_seq_length() == out.sequences.shape[1] - 1


@pytest.mark.skipif(not DROPS_WHOLLY, reason="this version drops the tokens with the cache")
@pytest.mark.parametrize("importance_input", ["value", "hidden"])
def test_the_callers_own_cache_is_taken_up_again(importance_input):
    model, (ids, mask) = make_longrope(importance_input=importance_input), make_prompt()
    cache = DynamicMaskCache(model)
    sequences = greedy(model, ids, mask, new=20, past_key_values=cache)
    assert torch.equal(sequences, greedy(model, ids, mask, new=20, use_cache=False))
    assert cache.max_keys == 12 and cache.get_seq_length() == sequences.shape[1] - 1
    assert not isinstance(model(ids, use_cache=True).past_key_values, DynamicMaskCache), "generate() is over"


@pytest.mark.skipif(DROPS_WHOLLY, reason="this version keeps the tokens")
def test_tokens_that_the_model_drops_with_the_cache_are_missed():
    with pytest.raises(ValueError, match="attention_mask must have"):
        greedy(make_longrope(), *make_prompt(), new=20)


@pytest.fixture
def growth():
    masks._warn_of_growth.cache_clear()
    yield
    masks._warn_of_growth.cache_clear()


def loop(model, cache=None):
    ids, _ = make_prompt()
    with torch.no_grad():
        for token in ids[0]:
            cache = model(token.view(1, 1), past_key_values=cache, use_cache=True).past_key_values
    return cache


@pytest.mark.parametrize("cache", [None, DynamicCache], ids=["made_by_the_model", "passed"])
def test_a_loop_over_a_growing_cache_warns_once(growth, cache):
    model = make_model("llama-topk")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            loop(model, None if cache is None else cache())
    caught = [str(warning.message) for warning in caught if "grows with every token" in str(warning.message)]
    assert len(caught) == 1 and "DynamicMaskCache(model)" in caught[0]


def test_a_loop_over_a_cache_of_constant_size_does_not_warn(growth):
    model = make_model("llama-topk")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*grows with every token")
        loop(model, DynamicMaskCache(model))
        loop(make_model("llama-topk", implementation="sdpa"))
        ids, _ = make_prompt()
        model(ids[:, :10], use_cache=True)
