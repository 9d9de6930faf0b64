"""convert_model: exactly dense up to the window, all or nothing, and an ordinary checkpoint afterwards."""

import copy
import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from flash_dmattn_hf import DynamicMaskConfig, dynamic_mask_config, iter_gates
from flash_dmattn_hf.conversion import convert as conversion
from flash_dmattn_hf.conversion.calibration import Calibration
from flash_dmattn_hf.conversion.convert import convert_model, with_window
from flash_dmattn_hf.conversion.variants import dense, without_importance

from ..tiny import tiny_model, tokens

WINDOW = DynamicMaskConfig(keep_window_size=32, num_sink_tokens=4, local_window_size=16)
TEXT = Calibration(tokens(1, 1600), stretch_length=160)
FAMILIES = ["llama", "qwen3", "gemma2", "phi3", "gpt2", "opt", "qwen3_next", "olmo2", "llava"]


def test_the_report_names_the_windows_of_single_layers():
    model = convert_model(tiny_model("llama"), {**WINDOW.to_dict(), "window_shares": {1: 1.25}})
    assert "  others      40 keys in layer 1: as many sinks and" in str(model.flash_dmattn_report)
    assert "  others  " not in str(convert_model(tiny_model("llama"), WINDOW).flash_dmattn_report)


def snapshot(model):
    text = model.config.get_text_config()
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return weights, text._attn_implementation, text.to_dict()


def same(before, after):
    return (
        before[1:] == after[1:]
        and before[0].keys() == after[0].keys()
        and all(torch.equal(before[0][name], after[0][name]) for name in before[0])
    )


@pytest.mark.parametrize("calibration, tolerance", [(None, 1e-4), (TEXT, 0.02)], ids=["uncalibrated", "calibrated"])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_dense_up_to_the_window_and_sparse_beyond(model_type, calibration, tolerance):
    model = tiny_model(model_type, initializer_range=0.3)
    model.set_attn_implementation("eager")  # sdpa of some versions drops the softcap
    ids = tokens(2, 80)
    expected = model(ids).logits
    convert_model(model, WINDOW, calibration=calibration)
    logits = model(ids).logits
    torch.testing.assert_close(logits[:, :32], expected[:, :32], rtol=0, atol=tolerance)
    assert (logits[:, 40:] - expected[:, 40:]).abs().max() > tolerance


@pytest.mark.parametrize("calibration", [None, TEXT], ids=["uncalibrated", "calibrated"])
def test_report(calibration):
    model = tiny_model("gemma2")
    before = sum(parameter.numel() for parameter in model.parameters())
    assert convert_model(model, WINDOW, calibration=calibration) is model
    report = model.flash_dmattn_report
    assert [layer.name for layer in report.layers] == ["model.layers.1.self_attn"]
    assert list(report.skipped) == ["model.layers.0.self_attn"]
    assert report.parameters_added == 2 + 2 * 16
    assert before + report.parameters_added == sum(parameter.numel() for parameter in model.parameters())
    assert report.calibration_tokens == (0 if calibration is None else 1600)
    assert len(report.layers[0].r2) == (0 if calibration is None else 2)
    text = str(report)
    assert "1 of 2 attention layers" in text and "32 keys = 4 sinks + 16 most recent + 12 by importance" in text
    assert "model.layers.0.self_attn: its sliding window of 10" in text
    assert json.loads(json.dumps(report.to_dict()))["parameters_added"] == 34


def test_settings_may_be_a_dict():
    model = convert_model(tiny_model("llama"), {"keep_window_size": 8})
    assert model.config.flash_dmattn["keep_window_size"] == 8
    with pytest.raises(ValueError, match="must be a dict, got int"):
        convert_model(tiny_model("llama"), 8)
    with pytest.raises(ValueError, match="calibration must be token ids in a tensor, got str"):
        convert_model(tiny_model("llama"), calibration="some text")


def test_default_sizes_are_those_for_dense_checkpoints():
    model = convert_model(tiny_model("llama"))
    gate = next(iter_gates(model))[2]
    assert vars(gate.config) == vars(DynamicMaskConfig(2048, 4, 1536))
    assert model.config.flash_dmattn == gate.config.to_dict()
    assert all((gate.A == 0).all() and gate.dt_proj.weight.abs().sum() > 0 for _, _, gate in iter_gates(model))


@pytest.mark.parametrize("settings", [{}, {"importance_heads": "query"}, {"importance": "zoh", "dt_proj_bias": True}])
def test_saved_conversion_loads_like_any_checkpoint(settings, tmp_path):
    config = DynamicMaskConfig(**{**vars(WINDOW), **settings})
    model = convert_model(tiny_model("llama", initializer_range=0.3), config, calibration=TEXT)
    model.save_pretrained(tmp_path)
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    ids = tokens(2, 80)
    assert torch.equal(again(ids).logits, model(ids).logits)


def interrupt(*_):
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    "calibration, patched, error",
    [
        (tokens(1, 100), {}, ValueError),
        (Calibration(tokens(1, 5000), stretch_length=30), {}, ValueError),
        (TEXT, {"calibrate": interrupt}, KeyboardInterrupt),
        (TEXT, {"ConversionReport": None}, TypeError),
    ],
    ids=["short-text", "short-stretch", "interrupted", "bug"],
)
@pytest.mark.parametrize("model_type", ["llama", "llava"])
def test_a_failed_conversion_leaves_the_model_as_it_was(model_type, calibration, patched, error, monkeypatch):
    model = tiny_model(model_type)
    before = snapshot(model)
    for name, replacement in patched.items():
        monkeypatch.setattr(conversion, name, replacement)
    with pytest.raises(error):
        convert_model(model, WINDOW, calibration=calibration)
    assert same(before, snapshot(model))
    monkeypatch.undo()
    convert_model(model, WINDOW)
    assert len(list(iter_gates(model))) == 2


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_broken_layer_is_named(bad):
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].self_attn.v_proj.weight[0, 0] = bad
    with pytest.raises(ValueError, match="model.layers.1.self_attn must have finite values"):
        convert_model(model, WINDOW, calibration=TEXT)
    assert not hasattr(model.config, "flash_dmattn")


@pytest.mark.parametrize(
    "model_type, sizes", [("mpt", {"d_model": 32, "n_heads": 4, "n_layers": 2}), ("bloom", {"n_head": 4})]
)
def test_a_refused_family_stays_as_it_was(model_type, sizes):
    model = tiny_model(model_type, **sizes)
    before = snapshot(model)
    with pytest.raises(ValueError, match="cannot use flash_dmattn"):
        convert_model(model, WINDOW)
    assert same(before, snapshot(model))


def test_converting_twice_is_refused(tmp_path):
    model = convert_model(tiny_model("llama"), WINDOW)
    with pytest.raises(ValueError, match="already has dynamic masks"):
        convert_model(model, WINDOW)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="already has dynamic masks"):
        convert_model(AutoModelForCausalLM.from_pretrained(tmp_path), WINDOW)


def test_native_doge_is_refused():
    with pytest.raises(ValueError, match="dynamic masks of its own"):
        convert_model(tiny_model("doge", head_dim=8))


@pytest.mark.parametrize("variant", ["with_window", "without_importance", "dense"])
def test_variants_are_undone(variant):
    model = convert_model(tiny_model("llama", initializer_range=0.3), WINDOW, calibration=TEXT)
    before = snapshot(model)
    make = {"with_window": lambda: with_window(model, 8), "without_importance": lambda: without_importance(model)}
    with pytest.raises(ZeroDivisionError), make.get(variant, lambda: dense(model))():
        assert not same(before, snapshot(model))
        raise ZeroDivisionError
    assert same(before, snapshot(model))


def test_with_window_is_the_model_loaded_with_that_window(tmp_path):
    model = convert_model(tiny_model("llama", initializer_range=0.3), WINDOW, calibration=TEXT)
    model.save_pretrained(tmp_path)
    with dynamic_mask_config(keep_window_size=16, num_sink_tokens=4, local_window_size=8):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = tokens(2, 80)
    with with_window(model, 16):
        assert next(iter_gates(model))[2].config.local_window_size == 8
        assert torch.equal(model(ids).logits, loaded(ids).logits)
        generated = model.generate(ids, max_new_tokens=5, do_sample=False)
    assert torch.equal(generated, loaded.generate(ids, max_new_tokens=5, do_sample=False))


def test_dense_and_without_importance_are_what_they_say():
    model = tiny_model("llama", initializer_range=0.3)
    ids = tokens(1, 80)
    expected = model(ids).logits
    plain = convert_model(copy.deepcopy(model), WINDOW)(ids).logits
    convert_model(model, WINDOW, calibration=TEXT)
    assert (model(ids).logits - plain).abs().max() > 1e-3
    with without_importance(model):
        torch.testing.assert_close(model(ids).logits, plain, rtol=0, atol=1e-5)
    with dense(model):
        torch.testing.assert_close(model(ids).logits, expected, rtol=0, atol=1e-5)


def test_variants_need_a_converted_model():
    with pytest.raises(ValueError, match="must be converted"), with_window(tiny_model("llama"), 8):
        pass
