"""DynamicMaskConfig: validation, resolution and the section; ImportanceGate: the equation and its precision."""

import dataclasses
import json

import pytest
import torch
import torch.nn.functional as F

from flash_dmattn_hf import DynamicMaskConfig, ImportanceGate, dynamic_mask_config
from flash_dmattn_hf.config import load_time_values, read_values

WRONG = {
    "w_zero": ({"keep_window_size": 0}, "keep_window_size must be an integer of at least 1, got 0"),
    "w_float": ({"keep_window_size": 8.0}, "keep_window_size must be an integer of at least 1, got 8.0"),
    "w_bool": ({"keep_window_size": True}, "keep_window_size must be an integer"),
    "w_none": ({"keep_window_size": None}, "keep_window_size must be an integer"),
    "s_negative": ({"num_sink_tokens": -1}, "num_sink_tokens must be an integer of at least 0, got -1"),
    "r_text": ({"local_window_size": "3"}, "local_window_size must be an integer of at least 0, got '3'"),
    "sum": ({"keep_window_size": 8, "num_sink_tokens": 4, "local_window_size": 5}, "got 4 \\+ 5 > 8"),
    "form": ({"importance": "linear"}, r"importance must be one of \['zoh', 'log_zoh'\], got 'linear'"),
    "input": ({"importance_input": "key"}, r"importance_input must be one of \['value', 'hidden'\], got 'key'"),
    "heads": ({"importance_heads": "all"}, "importance_heads must be one of"),
    "bias": ({"add_importance_bias": 1}, "add_importance_bias must be True or False, got 1"),
    "std": ({"initializer_std": -0.1}, "initializer_std must be a finite number of at least 0, got -0.1"),
    "std_nan": ({"initializer_std": float("nan")}, "initializer_std must be a finite number"),
    "layers": ({"layers": [-1]}, r"layers must be None or layer indices of at least 0, got \[-1\]"),
    "layers_empty": ({"layers": []}, "layers must be None or layer indices"),
    "layers_text": ({"layers": "01"}, "layers must be None or layer indices"),
    "shares": ({"window_shares": [2.5]}, r"window_shares must be None or a mapping from layer index .*, got \[2.5\]"),
    "shares_layer": ({"window_shares": {"-1": 2}}, "window_shares must name layers by their index, .*, got '-1'"),
    "shares_bool": ({"window_shares": {True: 2}}, "window_shares must name layers by their index, .*, got True"),
    "shares_twice": ({"window_shares": {3: 2, "3": 1}}, "window_shares must name layers .* each once, got '3'"),
    "shares_zero": ({"window_shares": {3: 0}}, "window_shares must be finite numbers above 0, got 0 for layer 3"),
    "shares_inf": ({"window_shares": {3: float("inf")}}, "window_shares must be finite numbers above 0, got inf"),
    "shares_nan": ({"window_shares": {3: float("nan")}}, "window_shares must be finite numbers above 0, got nan"),
    "shares_text": ({"window_shares": {3: "2"}}, "window_shares must be finite numbers above 0, got '2'"),
    "shares_huge": ({"window_shares": {3: 1e300}}, r"window_shares must keep at most \d+ keys, got 1e\+300"),
    "shares_full": (
        {"keep_window_size": 16, "num_sink_tokens": 2, "local_window_size": 7, "window_shares": {3: 0.5}},
        r"window_shares must leave every layer its .* = 2 \+ 7 keys, .*, got 0.5 \* 16 = 8 for layer 3",
    ),
    "shares_none_left": ({"window_shares": {3: 1e-4}}, "and one at least, got 0.0001 \\* 2048 = 0 for layer 3"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_values_are_named(case):
    values, sentence = WRONG[case]
    with pytest.raises(ValueError, match=sentence):
        DynamicMaskConfig(**values)


RESOLVED = {
    "default": ({}, (4, 1536), (0, 0)),
    "small": ({"keep_window_size": 8}, (2, 6), (0, 0)),
    "one": ({"keep_window_size": 1}, (0, 0), (0, 0)),
    "three": ({"keep_window_size": 3}, (0, 2), (0, 0)),
    "sinks_given": ({"keep_window_size": 8, "num_sink_tokens": 7}, (7, 1), (7, 0)),
    "local_given": ({"keep_window_size": 8, "local_window_size": 8}, (0, 8), (0, 8)),
    "both_given": ({"keep_window_size": 8, "num_sink_tokens": 0, "local_window_size": 0}, (0, 0), (0, 0)),
}


@pytest.mark.parametrize("case", RESOLVED)
def test_none_is_resolved_for_dense_and_for_native_models(case):
    values, dense, native = RESOLVED[case]
    for is_dense, expected in ((True, dense), (False, native)):
        config = DynamicMaskConfig(**values).resolve(dense=is_dense)
        assert (config.num_sink_tokens, config.local_window_size) == expected
        assert config.resolve(dense=not is_dense) == config


def test_section_round_trip():
    config = DynamicMaskConfig(64, 1, 2, "zoh", "query", False, True, 0.5, layers=(3, 1, 1), importance_input="hidden")
    assert config.layers == (1, 3)
    section = config.to_dict()
    assert section["layers"] == [1, 3]
    assert DynamicMaskConfig.from_dict(section) == config
    assert set(section) == {field.name for field in dataclasses.fields(config)} - {"window_shares"}
    assert set(config.to_values()) == {field.name for field in dataclasses.fields(config)}


def test_shares_go_through_json_and_none_leaves_a_section_as_it_was():
    config = DynamicMaskConfig(512, 4, 128, window_shares={"17": 2.5, 3: 0.5})
    section = json.loads(json.dumps(config.to_dict()))
    assert section == config.to_dict() and section["window_shares"] == {"3": 0.5, "17": 2.5}
    read = DynamicMaskConfig.from_dict(section)
    assert read == config and hash(read) == hash(config) and read.window_shares == {3: 0.5, 17: 2.5}
    assert [config.window_of(layer) for layer in (0, 3, 17)] == [512, 256, 1280]
    assert (config.smallest_window, config.largest_window) == (256, 1280)
    assert config.chosen()["window_shares"] == {"3": 0.5, "17": 2.5}
    for shares in (None, {}):
        plain = DynamicMaskConfig(512, window_shares=shares)
        assert plain == DynamicMaskConfig(512) and "window_shares" not in {**plain.to_dict(), **plain.chosen()}
        assert plain.smallest_window == plain.largest_window == plain.window_of(17) == 512


def test_a_resolved_local_window_must_fit_every_share():
    assert DynamicMaskConfig(16, window_shares={3: 1.25}).resolve().local_window_size == 12
    with pytest.raises(ValueError, match=r"= 4 \+ 12 keys, .*, got 0.5 \* 16 = 8 for layer 3"):
        DynamicMaskConfig(16, window_shares={3: 0.5}).resolve()


UPDATED = {
    "fits": ({"keep_window_size": 24}, (24, 2, 6), 12),
    "does_not_fit": ({"keep_window_size": 12}, (12, 2, 2), 6),
    "room_is_the_limit": ({"keep_window_size": 3}, (3, 2, 0), 2),
    "places_given": ({"keep_window_size": 8, "num_sink_tokens": 1, "local_window_size": 3}, (8, 1, 3), 4),
    "shares_given": ({"keep_window_size": 12, "window_shares": {5: 2}}, (12, 2, 6), 24),
    "shares_taken_away": ({"window_shares": None}, (32, 2, 6), 32),
    "another_setting": ({"layers": [5]}, (32, 2, 6), 16),
}


@pytest.mark.parametrize("case", UPDATED)
def test_shares_multiply_the_window_that_is_given_later(case):
    values, sizes, window = UPDATED[case]
    config = DynamicMaskConfig(32, 2, 6, window_shares={5: 0.5}).updated(values)
    assert (config.keep_window_size, config.num_sink_tokens, config.local_window_size) == sizes
    assert config.window_of(5) == window


def test_a_share_that_is_given_later_must_fit():
    with pytest.raises(ValueError, match=r"= 2 \+ 6 keys, .*, got 0.5 \* 12 = 6 for layer 5"):
        DynamicMaskConfig(32, 2, 6).updated({"keep_window_size": 12, "window_shares": {5: 0.5}})
    config = DynamicMaskConfig(32, 2, 6, window_shares={5: 0.5})
    assert config.updated(read_values(DynamicMaskConfig(8))) == DynamicMaskConfig(8)  # all of its settings, not some


@pytest.mark.parametrize("section", [{"window": 3}, [], "64", None], ids=str)
def test_from_dict_refuses_what_it_does_not_know(section):
    with pytest.raises(ValueError, match="config.flash_dmattn must"):
        DynamicMaskConfig.from_dict(section)


def test_config_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        DynamicMaskConfig().keep_window_size = 3


def test_load_time_values_nest_and_end():
    assert load_time_values() is None
    with dynamic_mask_config(keep_window_size=64, num_sink_tokens=1):
        with dynamic_mask_config(keep_window_size=32):
            assert load_time_values() == {"keep_window_size": 32, "num_sink_tokens": 1}
        assert load_time_values()["keep_window_size"] == 64
        with pytest.raises(ValueError, match="window_size"), dynamic_mask_config(window_size=3):
            pass
    assert load_time_values() is None


def gate_of(dtype=torch.float32, **values):
    torch.manual_seed(0)
    config = DynamicMaskConfig(**values).resolve(dense=True)
    gate = ImportanceGate(config, layer_idx=0, num_heads=6, num_kv_heads=2, head_dim=4)
    with torch.no_grad():
        for parameter in gate.parameters():
            parameter.normal_()
    return gate.to(dtype)


@pytest.mark.parametrize("importance", ["zoh", "log_zoh"])
@pytest.mark.parametrize("heads, num_importance_heads", [("kv", 2), ("query", 6)])
@pytest.mark.parametrize("bias", [False, True], ids=["no_bias", "bias"])
def test_gate_is_the_equation(importance, heads, num_importance_heads, bias):
    gate = gate_of(torch.float64, importance=importance, importance_heads=heads, dt_proj_bias=bias)
    value = torch.randn(3, 2, 5, 4, dtype=torch.float64)
    ours = gate(value)
    assert ours.shape == (3, num_importance_heads, 5) and ours.dtype == torch.float64
    for batch, head, token in ((0, 0, 0), (2, num_importance_heads - 1, 4), (1, 1, 3)):
        concatenated = torch.cat([value[batch, kv, token] for kv in range(2)])
        dt = gate.dt_proj.weight[head] @ concatenated + (gate.dt_proj.bias[head] if bias else 0)
        expected = gate.A[head] * F.softplus(dt)
        torch.testing.assert_close(ours[batch, head, token], expected.exp() if importance == "zoh" else expected)
    assert torch.autograd.gradcheck(gate, (value[:1, :, :2].clone().requires_grad_(),))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_gate_computes_in_float32(dtype):
    gate = gate_of(dtype)
    value = torch.randn(1, 2, 300, 4).to(dtype)
    ours = gate(value)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, gate.float()(value.float()))
    assert ours[0, 0].unique().numel() > 290


def test_zoh_does_not_overflow():
    gate = gate_of(importance="zoh")
    with torch.no_grad():
        gate.A.fill_(1e6)
    assert gate(torch.randn(1, 2, 5, 4)).isfinite().all()


@pytest.mark.parametrize("shape", [(1, 3, 5, 4), (1, 2, 5, 8), (2, 5, 4)], ids=str)
def test_gate_refuses_other_shapes(shape):
    with pytest.raises(ValueError, match="value of layer 0 must have shape"):
        gate_of()(torch.zeros(shape))


def test_dt_proj_is_no_linear_layer():
    assert not any(isinstance(module, torch.nn.Linear) for module in gate_of().modules())
