"""A static cache of models whose layers differ: native windows, chunks, convolutions, recurrences, shared keys."""

import copy

import pytest
import torch
from transformers.cache_utils import LinearAttentionLayer

from flash_dmattn_hf import DynamicMaskCache, dynamic_mask_config
from flash_dmattn_hf.cache.hybrid import HybridCacheLayer
from flash_dmattn_hf.cache.layer import DynamicMaskCacheLayer
from flash_dmattn_hf.cache.native import NativeCacheLayer
from flash_dmattn_hf.cache.snapshot import CacheSnapshot
from flash_dmattn_hf.versions import can_mask_chunks

from ..converted import converted
from ..cross_attention_models import bart, mllama
from ..recorded_graph import RecordedGraph, record_graphs
from ..tiny import build, tiny_config, tokens

WIDE = {"keep_window_size": 12}  # holds the sliding window of 10 tokens, which then stays native

KINDS = {
    "gemma2": (WIDE, [NativeCacheLayer, DynamicMaskCacheLayer]),
    "gemma3_text": (WIDE, [NativeCacheLayer, DynamicMaskCacheLayer]),
    "gpt_oss": (WIDE, [NativeCacheLayer, DynamicMaskCacheLayer]),
    **({"llama4_text": ({}, [NativeCacheLayer, DynamicMaskCacheLayer])} if can_mask_chunks() else {}),
    "qwen3_next": ({}, [LinearAttentionLayer, DynamicMaskCacheLayer]),
    "lfm2": ({}, [LinearAttentionLayer, DynamicMaskCacheLayer]),
    "falcon_h1": ({}, [HybridCacheLayer, HybridCacheLayer]),
    "gemma3n_text": ({}, [DynamicMaskCacheLayer, DynamicMaskCacheLayer]),
    "gemma3n_text-native": (WIDE, [NativeCacheLayer, DynamicMaskCacheLayer]),
    "deepseek_v3": ({"importance_heads": "shared"}, [DynamicMaskCacheLayer, DynamicMaskCacheLayer]),
}
"""Kind -> its settings, and the layers of its static cache that hold something."""

NATIVE = [kind for kind in ("gemma3_text", "llama4_text") if kind in KINDS]
NEW = 14


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def model(kind):
    return make_model(kind)


def make_model(kind):
    model = converted(kind.partition("-")[0], **KINDS[kind][0])
    model.set_experts_implementation("batched_mm")  # as generate() does on a GPU
    for name, parameter in model.named_parameters():
        if name.endswith("sinks"):
            torch.nn.init.normal_(parameter)
    for module in model.modules():
        if hasattr(module, "floor_scale"):  # Llama 4 scales queries by their position, and soon enough to be seen
            module.floor_scale = 4.0
    return model


def prompt(length, padding=0, gap=0):
    """Two rows, of which the first begins with padding and the second has some in its middle."""
    ids = tokens(2, length)
    mask, middle = torch.ones_like(ids), slice(length // 2, length // 2 + gap)
    ids[0, :padding] = mask[0, :padding] = ids[1, middle] = mask[1, middle] = 0
    return ids, mask


def greedy(model, ids, mask, new=NEW, **options):
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, **options}
    return model.generate(ids, attention_mask=mask, max_new_tokens=new, **options)


PROMPTS = {
    "below-windows": (5, 0),
    "padded-below-windows": (6, 3),
    "beyond": (21, 0),
    "padded-beyond": (21, 4),
    "gap": (21, 4, 6),
}


@pytest.fixture(scope="module")
def expected(model):
    """The ids of every prompt without a cache."""
    return {name: greedy(model, *prompt(*shape), use_cache=False).tolist() for name, shape in PROMPTS.items()}


def test_its_layers_have_a_constant_size(model, kind):
    cache = DynamicMaskCache(model, static=True)
    kinds = KINDS[kind][1]
    assert [type(layer) for layer in cache.layers[: len(kinds)]] == kinds
    sizes = set()
    with torch.no_grad():
        for ids in tokens(1, 30).split([12, 10, 1, 7], 1):
            model(ids, past_key_values=cache)
            sizes.add(cache.nbytes)
    assert len(sizes) == 1


@pytest.mark.parametrize("name", PROMPTS)
def test_it_generates_what_the_dynamic_cache_and_none_generate(model, expected, name):
    ids, mask = prompt(*PROMPTS[name])
    assert greedy(model, ids, mask).tolist() == expected[name]
    assert greedy(model, ids, mask, cache_implementation="static").tolist() == expected[name]


def test_a_cache_is_filled_in_chunks_and_used_again(model, expected):
    cache = DynamicMaskCache(model, static=True)
    for name in ("padded-beyond", "gap", "beyond", "below-windows"):
        ids, mask = prompt(*PROMPTS[name])
        found = greedy(model, ids, mask, past_key_values=cache, prefill_chunk_size=8)
        assert found.tolist() == expected[name], name
        addresses = cache.addresses()
        cache.reset()
        assert cache.addresses() == addresses and cache.get_seq_length() == 0


def test_a_step_that_was_recorded_once_holds_for_every_later_token(model, expected, monkeypatch):
    """Windows become full and chunks end after the recording: nothing of that may have been decided by the host."""
    cache = DynamicMaskCache(model, static=True)
    record_graphs(monkeypatch, model, cache)
    for name in ("padded-below-windows", "gap", "beyond"):
        found = greedy(model, *prompt(*PROMPTS[name]), past_key_values=cache)
        assert found.tolist() == expected[name], name
        cache.reset()
    assert RecordedGraph.num_replays >= NEW - 2


@pytest.mark.parametrize("is_static", [False, True])
def test_native_windows_do_not_count_as_kept_keys(is_static):
    model = converted("gemma3_text", layers=[1])  # the other layer has a sliding window of 10 tokens
    cache = DynamicMaskCache(model, static=is_static)
    with torch.no_grad():
        model(tokens(1, 30), past_key_values=cache)
    assert cache.max_keys == 8


@pytest.mark.parametrize("kind", [*NATIVE, "falcon_h1"])
def test_beams_move_the_rows_of_every_layer(kind):
    model, (ids, mask) = make_model(kind), prompt(6, 2)
    found, expected = (
        greedy(model, ids, mask, num_beams=3, **options)
        for options in ({"cache_implementation": "static"}, {"use_cache": False})
    )
    assert found.tolist() == expected.tolist()


@pytest.mark.parametrize("kind", NATIVE)
def test_tokens_are_taken_back_from_native_windows_and_chunks(kind):
    model = make_model(kind)
    ids, mask = prompt(21)
    ids, mask = ids[:1], mask[:1]
    cache = DynamicMaskCache(model, static=True)
    found = greedy(model, ids, mask, past_key_values=cache, prompt_lookup_num_tokens=4)
    assert found.tolist() == greedy(model, ids, mask, use_cache=False).tolist()
    assert not any(layer.record_past for layer in cache.mask_layers)


@pytest.mark.parametrize("kind", NATIVE)
def test_a_snapshot_goes_on_in_any_batch(kind, tmp_path):
    model = make_model(kind)
    ids, mask = prompt(21)
    expected = greedy(model, ids, mask, use_cache=False)
    cache = DynamicMaskCache(model, static=True)
    with torch.no_grad():
        model(ids[:1, :-1], past_key_values=cache)
    cache.snapshot().save(tmp_path / "prefix.safetensors")
    restored = CacheSnapshot.load(tmp_path / "prefix.safetensors").restore(model, 2, static=True)
    ids = ids[:1].repeat(2, 1)
    assert greedy(model, ids, mask, past_key_values=restored).tolist() == expected[:1].repeat(2, 1).tolist()
    assert [type(layer) for layer in copy.deepcopy(cache).layers] == KINDS[kind][1]


@pytest.mark.parametrize("length", [5, 21])
@pytest.mark.parametrize("kind", NATIVE)
def test_a_static_cache_goes_on_from_the_state_of_a_dynamic_one(kind, length):
    model, (ids, mask) = make_model(kind), prompt(length, 2)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    dynamic, static = DynamicMaskCache(model), DynamicMaskCache(model, static=True)
    with torch.no_grad():
        model(ids[:, :-1], attention_mask=mask[:, :-1], position_ids=positions[:, :-1], past_key_values=dynamic)
    static.load_state_dict(dynamic.state_dict())
    found = greedy(model, ids, mask, past_key_values=static)
    assert found.tolist() == greedy(model, ids, mask, use_cache=False).tolist()


def test_layers_whose_keys_grow_are_refused():
    model = converted("llama", layers=[1])
    with pytest.raises(ValueError, match="in every attention layer, got layer 0, whose keys grow with the text"):
        DynamicMaskCache(model, static=True)


def test_cross_attention_is_refused():
    with pytest.raises(ValueError, match="keys of the text alone, got layer 1, whose cross-attention has the keys"):
        DynamicMaskCache(mllama(), static=True)
    with pytest.raises(ValueError, match="in every attention layer, got layer 1, whose keys grow with the text"):
        DynamicMaskCache(bart(layers=[0]), static=True)  # its layer of the cache is that of the self-attention


@pytest.mark.skipif(can_mask_chunks(), reason="this transformers makes masks for chunked layers")
def test_chunks_are_refused_where_transformers_makes_no_masks_for_them():
    with pytest.raises(ValueError, match="a static cache of chunked layers needs a transformers whose"):
        DynamicMaskCache(converted("llama4_text"), static=True)


def test_states_outside_the_cache_are_refused():
    with dynamic_mask_config(keep_window_size=8):
        config = tiny_config("recurrent_gemma", block_types=["recurrent", "attention"])
        model = build(config, attn_implementation="flash_dmattn").eval()
    with pytest.raises(ValueError, match="RecurrentGemmaForCausalLM, whose recurrent layers replace tensors"):
        greedy(model, *prompt(6), cache_implementation="static")


def test_a_model_that_makes_its_own_cache_refuses_a_static_one_and_slots_in_8_bits():
    model, rounding = converted("minimax"), {"slot_dtype": "float8_e4m3fn"}
    with pytest.raises(ValueError, match="must not be 'static' for MiniMaxForCausalLM, which makes a cache"):
        greedy(model, *prompt(6), cache_implementation="static")
    with pytest.raises(ValueError, match="must not have a slot_dtype for MiniMaxForCausalLM, which makes a cache"):
        greedy(model, *prompt(6), cache_config=rounding)
    assert torch.equal(greedy(model, *prompt(6), cache_config=rounding, use_cache=False), greedy(model, *prompt(6)))
