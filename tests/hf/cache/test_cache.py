"""DynamicMaskCache as an object: what a user of DynamicCache expects of it, and that it is constant and lossless."""

import copy
import gc
import weakref

import pytest
import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicSlidingWindowLayer

from flash_dmattn_hf.cache.cache import DynamicMaskCache, DynamicMaskCacheLayer

from ..generation_models import PROMPT, greedy, left_padded_prompt, make_model, make_prompt


@pytest.fixture(scope="module")
def model():
    return make_model("llama-sinks-local")


def filled(model, length=PROMPT, batch=1):
    past, (ids, _) = DynamicMaskCache(model), make_prompt(batch=batch, length=length)
    with torch.no_grad():
        model(ids, past_key_values=past)
    return past


def test_it_is_a_dynamic_cache_with_a_layer_per_layer(model):
    past = filled(model)
    assert isinstance(past, DynamicCache) and len(past) == 2
    assert all(type(layer) is DynamicMaskCacheLayer for layer in past.layers)
    assert [layer.keys.shape for layer in past.layers] == [(1, 2, 16, 8)] * 2
    assert past.get_seq_length() == PROMPT and past.get_mask_sizes(3, 0) == (PROMPT + 3, 0)
    assert not past.is_compileable and past.is_croppable and past.get_max_length() == -1
    assert past.is_initialized and past.is_sliding == [False, False]


def test_it_is_made_for_a_model(model):
    with pytest.raises(ValueError, match="model must be a model of transformers, got LlamaConfig"):
        DynamicMaskCache(model.config)


def test_layers_without_a_gate_keep_their_own_cache():
    """A sliding window of at most keep_window_size needs no dynamic mask."""
    past = DynamicMaskCache(make_model("qwen2-sliding-below-w"))
    assert [type(layer) for layer in past.layers] == [DynamicSlidingWindowLayer, DynamicMaskCacheLayer]
    past = DynamicMaskCache(make_model("qwen2-sliding-above-w"))
    assert [type(layer) for layer in past.layers] == [DynamicMaskCacheLayer] * 2


@pytest.mark.parametrize("kind", ["llama-query-heads", "qwen2-sliding-below-w", "gpt2-mha"])
def test_sizes_do_not_grow(kind):
    model = make_model(kind)
    short, long = filled(model, 30), filled(model, 90)
    assert short.nbytes == long.nbytes > 0
    assert short.max_keys == long.max_keys <= 12


def test_nbytes_counts_every_tensor(model):
    past = filled(model, batch=3)
    layer = past.layers[0]
    keys_and_values = 2 * 3 * 2 * 16 * 8 * 8
    importance, positions, row_is_real = 3 * 2 * 16 * 8, 3 * 2 * 16 * 4, 3 * 16
    victims = lengths = arrivals = 3 * 2 * 4
    assert layer.nbytes == keys_and_values + importance + positions + row_is_real + victims + lengths + arrivals
    assert past.nbytes == 2 * layer.nbytes
    assert DynamicMaskCache(model).nbytes == 0 and DynamicMaskCache(model).max_keys == 0


def test_nbytes_counts_the_slots_of_each_layer():
    """Two layers of 9 and 21 slots take as much as half of two of 9 and half of two of 21."""
    model = make_model("llama-shares")
    mixed, equal = filled(model, 90).nbytes, []
    for window in (9, 21):
        model.config.flash_dmattn = {**model.config.flash_dmattn, "keep_window_size": window, "window_shares": None}
        equal.append(filled(model, 90).nbytes)
    assert 2 * mixed == sum(equal)


def test_a_state_of_other_shares_is_refused():
    model = make_model("llama-shares")
    state = filled(model).state_dict()
    model.config.flash_dmattn["window_shares"]["0"] = 1
    with pytest.raises(ValueError, match="windows .*'keep_window_size': 12.*got .*'keep_window_size': 9"):
        DynamicMaskCache(model).load_state_dict(state)


def test_it_does_not_keep_the_model_alive():
    model = make_model("llama-topk")
    past, ids = filled(model), make_prompt()[0]
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
    with pytest.raises(RuntimeError, match="model of this DynamicMaskCache no longer exists"):
        past.update(torch.zeros(1, 2, 1, 8), torch.zeros(1, 2, 1, 8), 0)
    assert ids is not None


def test_a_deepcopied_prompt_serves_several_continuations(model):
    """The usual way to reuse a prefix: copy its cache, then continue the copy."""
    prefix, (ids, _) = filled(model, PROMPT), make_prompt(length=PROMPT)
    size = prefix.nbytes
    for seed in (1, 2):
        whole = torch.cat([ids, make_prompt(length=4, seed=seed)[0]], dim=1)
        mask = torch.ones_like(whole)
        twin = copy.deepcopy(prefix)
        assert twin.belongs_to(model)
        found = greedy(model, whole, mask, new=5, past_key_values=twin)
        assert found.tolist() == greedy(model, whole, mask, new=5, use_cache=False).tolist()
    assert prefix.nbytes == size and prefix.get_seq_length() == PROMPT


def test_a_deepcopy_of_the_model_takes_no_cache_of_the_original(model):
    twin = copy.deepcopy(model)
    assert not DynamicMaskCache(model).belongs_to(twin) and DynamicMaskCache(twin).belongs_to(twin)
    ids, mask = make_prompt()
    assert greedy(twin, ids, mask).tolist() == greedy(model, ids, mask).tolist()


def test_reset_starts_again(model):
    past, (ids, mask) = filled(model, 40), make_prompt(seed=4)
    past.reset()
    assert past.get_seq_length() == 0
    found = greedy(model, ids, mask, past_key_values=past, new=5)
    assert found.tolist() == greedy(model, ids, mask, new=5).tolist()


def test_rows_can_be_repeated_and_selected(model):
    """One prefill for several continuations, of which some are given up."""
    past, (ids, _) = filled(model), make_prompt()
    past.batch_repeat_interleave(3)
    tails = make_prompt(batch=3, length=5, seed=9)[0]
    with torch.no_grad():
        found = model(tails, past_key_values=past, position_ids=torch.arange(PROMPT, PROMPT + 5)[None]).logits
        whole = torch.cat([ids.repeat(3, 1), tails], dim=1)
        expected = model(whole, use_cache=False).logits[:, PROMPT:]
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
        past.batch_select_indices(torch.tensor([2, 0]))
        more = make_prompt(batch=2, length=1, seed=8)[0]
        found = model(more, past_key_values=past, position_ids=torch.tensor([[PROMPT + 5]])).logits
        whole = torch.cat([whole[[2, 0]], more], dim=1)
        expected = model(whole, use_cache=False).logits[:, -1:]
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


def test_a_user_takes_back_tokens_that_were_recorded(model):
    ids, mask = left_padded_prompt()
    past = DynamicMaskCache(model)
    greedy(model, ids, mask, new=3, past_key_values=past)
    past.activate_past_recording()
    length = past.get_seq_length()
    wrong = make_prompt(batch=3, length=9, seed=3)[0]
    full_mask = torch.cat([mask, mask.new_ones(3, length + 9 - mask.shape[1])], dim=1)
    with torch.no_grad():
        model(wrong, attention_mask=full_mask, past_key_values=past)
        assert past.max_keys == 16 + 9
        past.crop(-9)
    assert past.get_seq_length() == length and past.max_keys == 16
    again = greedy(model, ids, mask, new=3)
    more = torch.cat([again, make_prompt(batch=3, length=2, seed=5)[0]], dim=1)
    more_mask = torch.cat([mask, mask.new_ones(3, 5)], dim=1)
    found = greedy(model, more, more_mask, new=4, past_key_values=past)
    assert found.tolist() == greedy(model, more, more_mask, new=4, use_cache=False).tolist()


def test_crop_takes_a_number_in_a_tensor():
    """As transformers 5.17 passes it in assisted decoding."""
    past = filled(make_model("qwen2-sliding-below-w"), length=6)
    past.crop(torch.tensor(-2))
    assert [type(layer.get_seq_length()) for layer in past.layers] == [int, int]
    assert past.get_seq_length(0) == past.get_seq_length(1) == 4


def test_cropping_what_is_gone_is_an_error(model):
    past = filled(model)
    with pytest.raises(ValueError, match="tokens_to_remove must be at least 0, got -1.*activate_past_recording"):
        past.crop(-1)


@pytest.mark.parametrize("kind", ["llama-sinks-local", "llama-shares", "llama-query-heads", "qwen2-sliding-below-w"])
def test_a_saved_cache_goes_on_where_it_was(kind, tmp_path):
    model = make_model(kind)
    (ids, _), cache = make_prompt(batch=2, length=70), DynamicMaskCache(model)
    with torch.no_grad():
        model(ids[:, :50], past_key_values=cache)
        torch.save(cache.state_dict(), tmp_path / "cache.pt")
        expected = model(ids[:, 50:], past_key_values=cache).logits
        other = DynamicMaskCache(model)
        model(ids[:1, :9], past_key_values=other)  # another batch size, to be forgotten
        other.load_state_dict(torch.load(tmp_path / "cache.pt", weights_only=True))
        assert other.get_seq_length() == 50
        assert torch.equal(model(ids[:, 50:], past_key_values=other).logits, expected)


def test_a_state_that_does_not_fit_is_refused(model):
    cache = filled(model)
    state = cache.state_dict()
    state["layers"][1]["windows"] = {**state["layers"][1]["windows"], "keep_window_size": 3}
    with pytest.raises(ValueError, match="state must be of a layer with the windows .*'keep_window_size': 3"):
        DynamicMaskCache(model).load_state_dict(state)
    before = cache.layers[0].positions.clone()
    with pytest.raises(ValueError, match="state must be of a layer"):
        cache.load_state_dict(state)
    assert torch.equal(cache.layers[0].positions, before) and cache.get_seq_length() == PROMPT
    with pytest.raises(ValueError, match="state must have 2 layers, got 1"):
        cache.load_state_dict({"layers": state["layers"][:1]})
    cache.activate_past_recording()
    with pytest.raises(RuntimeError, match="can still be undone cannot be saved"):
        cache.state_dict()


def test_it_moves_to_a_device_and_back(model):
    past, (ids, _) = filled(model), make_prompt(length=PROMPT + 1)
    past.to("cpu")
    for index in range(len(past)):
        past.offload(index)
        past.layers[index].prefetch()
    with torch.no_grad():
        position = torch.tensor([[PROMPT]])
        found = model(ids[:, -1:], past_key_values=past, position_ids=position).logits
        expected = model(ids, use_cache=False).logits[:, -1:]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("kind", ["llama-topk", "llama-query-heads"])
def test_gradients_flow_through_the_cache(kind):
    """Gradients of a text without repeated tokens (no ties) in pieces are those of one forward."""
    model = make_model(kind)
    ids = torch.stack([torch.arange(2, 2 + PROMPT), torch.arange(40, 40 + PROMPT)])
    weight = torch.randn(2, PROMPT, 97, dtype=torch.float64)
    gradients = []
    for pieces in ([PROMPT], [9, 1, 1, PROMPT - 11]):
        model.zero_grad()
        past = DynamicMaskCache(model) if len(pieces) > 1 else None
        options = {"past_key_values": past, "use_cache": past is not None}
        logits = [model(piece, **options).logits for piece in ids.split(pieces, 1)]
        (torch.cat(logits, dim=1) * weight).sum().backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    assert gradients[0]["model.layers.0.self_attn.dma.A"].abs().max() > 1e-3
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-7, atol=1e-7, msg=name)


def test_layers_can_be_initialized_early(model):
    past = DynamicMaskCache(model)
    past.early_initialization(2, 2, 8, torch.float64, torch.device("cpu"))
    assert past.is_initialized and past.get_seq_length() == 0
    ids, mask = make_prompt(batch=2)
    found = greedy(model, ids, mask, past_key_values=past, new=4)
    assert found.tolist() == greedy(model, ids, mask, new=4).tolist()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_importance_is_kept_in_float32(dtype):
    model = make_model("llama-sinks-local", dtype=dtype)
    past = filled(model, 40)
    layer = past.layers[0]
    assert (layer.keys.dtype, layer.values.dtype, layer.importance.dtype) == (dtype, dtype, torch.float32)
    assert past.max_keys == 16


def test_inference_mode_then_ordinary_decoding(model):
    past, (ids, _) = DynamicMaskCache(model), make_prompt(length=PROMPT + 2)
    with torch.inference_mode():
        model(ids[:, :PROMPT], past_key_values=past)
    with torch.no_grad():
        positions = torch.arange(PROMPT, PROMPT + 2)[None]
        for step in range(2):
            row = slice(PROMPT + step, PROMPT + step + 1)
            found = model(ids[:, row], past_key_values=past, position_ids=positions[:, step : step + 1]).logits
        expected = model(ids, use_cache=False).logits[:, -1:]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
