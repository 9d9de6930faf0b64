"""Windows of single layers: each layer sees what the definition says of its own window, and only gates have one."""

import copy

import pytest
import torch

from flash_dmattn_hf import DynamicMaskCache, convert_model, dynamic_mask_config, iter_gates
from flash_dmattn_hf.conversion.variants import with_window

from ..converted import WINDOW, converted
from ..dense_definition import by_definition
from ..tiny import build, tiny_config, tiny_model, tokens

SHARES = {0: 0.75, 1: 1.5}  # of 8 keys, 5 of them sinks and local window: 6 and 12
LENGTH = 24
CASES = {
    "one layer": ("llama", {"window_shares": {"1": 2.5}}, [8, 20]),
    "all layers": ("llama", {"window_shares": SHARES}, [6, 12]),
    "query heads": ("llama", {"window_shares": SHARES, "importance_heads": "query"}, [6, 12]),
    "hidden states": ("qwen3", {"window_shares": SHARES, "importance_input": "hidden"}, [6, 12]),
    "nothing but sinks and local window": ("gpt2", {"window_shares": {0: 0.625}}, [5, 8]),
    "within a sliding window": ("mistral", {"window_shares": {0: 0.75, 1: 1.125}}, [6, 9]),
    "a gate where there would be none": (
        "gemma2",  # its sliding window is 10
        {"keep_window_size": 12, "window_shares": {0: 0.75}},
        [9, 12],
    ),
    "shared keys": ("gemma3n_text", {"window_shares": SHARES}, [6, 12]),
}


def windows_of(model):
    return [gate.windows.keep_window_size for _, _, gate in iter_gates(model)]


def left_padded():
    input_ids = tokens(2, LENGTH)
    attention_mask = torch.ones_like(input_ids)
    attention_mask[0, :3] = 0
    return {"input_ids": input_ids, "attention_mask": attention_mask}


def logits_and_gradients(model, inputs):
    model.zero_grad()
    logits = model(**inputs, use_cache=False).logits[inputs["attention_mask"].bool()]
    logits.square().sum().backward()
    return {"logits": logits.detach(), **{name: p.grad for name, p in model.named_parameters() if p.grad is not None}}


@pytest.mark.parametrize("case", CASES)
def test_every_layer_equals_the_definition(case):
    model_type, settings, windows = CASES[case]
    model, inputs = converted(model_type, **settings).train(), left_padded()
    assert windows_of(model) == windows
    ours = logits_and_gradients(model, inputs)
    with by_definition(model):
        expected = logits_and_gradients(model, inputs)
    assert ours.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(ours[name], tensor, atol=1e-4, rtol=1e-4, msg=name)


@torch.no_grad()
def test_a_share_changes_its_layer_alone():
    """In a model of two layers the first sees what it saw: its keys and values for the second are the same."""
    plain, model = converted(), converted(window_shares={1: 2})
    first, second = [], []
    for each, found in ((plain, first), (model, second)):
        for layer in each.model.layers:
            layer.register_forward_hook(lambda *given, found=found: found.append(given[-1]))
        each(tokens(1, LENGTH), use_cache=False)
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1][:, :8], second[1][:, :8]) and not torch.equal(first[1], second[1])


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@pytest.mark.parametrize("case", ["all layers", "query heads", "within a sliding window", "shared keys"])
@torch.no_grad()
def test_in_any_chunks_a_cache_sees_what_one_pass_sees(case, static):
    model_type, settings, windows = CASES[case]
    model, input_ids = converted(model_type, **settings), torch.stack([torch.randperm(90)[:LENGTH] + 4] * 2)
    with by_definition(model):
        expected = model(input_ids, use_cache=False).logits
    for chunks in ([LENGTH], [7, 1, 1, 15], [1] * LENGTH):
        cache = DynamicMaskCache(model, static=static)
        found = torch.cat([model(ids, past_key_values=cache).logits for ids in input_ids.split(chunks, 1)], 1)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert [layer.keys.shape[2] for layer in cache.mask_layers] == windows and cache.max_keys == max(windows)


@torch.no_grad()
def test_shares_multiply_another_window():
    model = converted(window_shares=SHARES)
    with with_window(model, 16):
        assert windows_of(model) == [12, 24] and model.config.flash_dmattn["window_shares"] == {"0": 0.75, "1": 1.5}
        assert next(iter_gates(model))[2].windows[1:3] == (2, 6)
    with with_window(model, 4):  # 3 keys in the first layer: the local window gives way
        assert windows_of(model) == [3, 6] and next(iter_gates(model))[2].windows[1:3] == (2, 1)
    assert windows_of(model) == [6, 12]
    with pytest.raises(ValueError, match=r"got 0.75 \* 8 = 6 for layer 0"), with_window(model, 8, local_window_size=5):
        pass


def test_a_live_change_reaches_the_layer_it_names():
    model, ids = converted(window_shares={1: 1.5}), tokens(1, LENGTH)
    model(ids, use_cache=False)
    model.config.flash_dmattn["window_shares"]["1"] = 2
    assert windows_of(model) == [8, 16]
    model.config.flash_dmattn["window_shares"] = {0: 0.75}
    assert windows_of(model) == [6, 8] and model.config.flash_dmattn["window_shares"] == {"0": 0.75}
    cache = DynamicMaskCache(model)
    model(ids, past_key_values=cache)
    del model.config.flash_dmattn["window_shares"]
    with pytest.raises(ValueError, match=r"must be {'window_shares': {'0': 0.75}}, .* got {'window_shares': None}"):
        model(ids[:, :1], past_key_values=cache)
    native = converted(layers=[0])
    native.config.flash_dmattn["window_shares"] = {"1": 2}
    with pytest.raises(ValueError, match=r"window_shares must name .* layer 1: layer 1 is not among layers=\[0\]"):
        native(ids, use_cache=False)


def test_a_layer_that_was_renumbered_has_the_window_of_its_number():
    model, ids = converted(window_shares={0: 2}), tokens(1, LENGTH)
    model(ids, use_cache=False)
    first = copy.deepcopy(model.model.layers[1])
    model.model.layers = torch.nn.ModuleList([first])
    model.config.num_hidden_layers, first.self_attn.layer_idx = 1, 0
    ours = model(ids, use_cache=False).logits  # nothing has looked for gates since
    assert windows_of(model) == [16]
    with by_definition(model):
        torch.testing.assert_close(model(ids, use_cache=False).logits, ours, atol=1e-5, rtol=1e-5)


WITHOUT_GATE = {
    "no such layer": ("llama", {"window_shares": {2: 2}}, r"layer 2: Llama.* has no attention with this index"),
    "left out": ("llama", {"window_shares": {1: 2}, "layers": [0]}, r"layer 1: layer 1 is not among layers=\[0\]"),
    "sliding": (
        "gemma2",
        {"window_shares": {0: 1.25}},
        "layer 0: its sliding window of 10 is within keep_window_size=10",
    ),
    "shares keys": (
        "gemma3n_text",
        {"window_shares": {2: 2}},
        "layer 2: layer 2 shares the keys, values and importance of an earlier layer",
    ),
    "chunked": ("llama4_text", {"window_shares": {0: 2}}, "layer 0: layer 0 attends within chunks of 7 tokens"),
}


@pytest.mark.parametrize("case", WITHOUT_GATE)
def test_a_layer_without_a_gate_is_refused(case):
    model_type, settings, sentence = WITHOUT_GATE[case]
    expected = f"window_shares must name layers with an importance gate, got {sentence}"
    with pytest.raises(ValueError, match=expected), dynamic_mask_config(**WINDOW, **settings):
        build(tiny_config(model_type), attn_implementation="flash_dmattn")
    dense = tiny_model(model_type)
    with pytest.raises(ValueError, match=expected):
        convert_model(dense, {**WINDOW, **settings})
    assert not any(iter_gates(dense)) and getattr(dense.config, "flash_dmattn", None) is None
