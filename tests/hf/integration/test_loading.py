"""Loading: gates exist before weights do, are saved and reloaded, and are never silently wrong."""

import copy
import json
import subprocess
import sys
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, LlamaModel

from flash_dmattn_hf import DynamicMaskConfig, dynamic_mask_config, iter_gates

from ..tiny import tiny_config, tiny_model, tokens

SMALL = {"keep_window_size": 8, "num_sink_tokens": 2, "local_window_size": 3}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A directory with a dense checkpoint."""
    path = tmp_path_factory.mktemp("plain")
    tiny_model("llama").save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def converted(plain, tmp_path_factory):
    """A directory with a checkpoint that has random importance."""
    path = tmp_path_factory.mktemp("converted")
    model = load(plain, flash_dmattn=SMALL)
    randomize(model)
    model.save_pretrained(path)
    return path


def load(path, implementation="flash_dmattn", **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return AutoModelForCausalLM.from_pretrained(path, attn_implementation=implementation, **kwargs).eval()


def randomize(model):
    torch.manual_seed(1)
    with torch.no_grad():
        for _, _, gate in iter_gates(model):
            gate.A.normal_()
            gate.dt_proj.weight.normal_()


def gates_of(model):
    return [gate for _, _, gate in iter_gates(model)]


@torch.no_grad()
def logits_of(model, length=20):
    return model(tokens(2, length)).logits


def test_first_try_in_a_fresh_process(plain):
    program = (
        "import sys, flash_dmattn_hf\n"
        "from transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1], attn_implementation='flash_dmattn')\n"
        "print(model.config._attn_implementation, len(list(flash_dmattn_hf.iter_gates(model))))\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(plain)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["flash_dmattn", "2"]


@pytest.mark.parametrize("name", ["flash_dmattn", "dmattn"])
def test_both_names(plain, name):
    model = load(plain, name, flash_dmattn=SMALL)
    assert model.config._attn_implementation == name
    assert torch.equal(logits_of(model), logits_of(load(plain, flash_dmattn=SMALL)))


def test_plain_checkpoint_gets_the_conversion_defaults_and_one_warning(plain):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = AutoModelForCausalLM.from_pretrained(plain, attn_implementation="flash_dmattn")
    assert len([w for w in caught if "untrained" in str(w.message)]) == 1
    assert model.config.flash_dmattn == DynamicMaskConfig(2048, 4, 1536).to_dict()
    for gate in gates_of(model):
        assert gate.A.eq(0).all()
        assert gate.dt_proj.weight.std() > 0
    torch.testing.assert_close(logits_of(model), logits_of(tiny_model("llama")), atol=1e-5, rtol=0)


def test_untrained_model_is_dense_up_to_the_window_and_sinks_and_window_beyond(plain):
    dense, model = tiny_model("llama"), load(plain, flash_dmattn={"keep_window_size": 12})
    assert (gates_of(model)[0].config.num_sink_tokens, gates_of(model)[0].config.local_window_size) == (3, 9)
    difference = (logits_of(model, 24) - logits_of(dense, 24)).abs().amax((0, 2))
    assert difference[:12].max() < 1e-5
    assert difference[12:].min() > 1e-5


def test_reload_without_naming_the_implementation(converted):
    model, info = AutoModelForCausalLM.from_pretrained(converted, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert model.config._attn_implementation == "flash_dmattn"
    assert torch.equal(logits_of(model.eval()), logits_of(load(converted)))
    assert gates_of(model)[0].A.abs().max() > 0


def test_round_trip_keeps_logits_and_settings(converted, tmp_path):
    model = load(converted)
    model.save_pretrained(tmp_path)
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert again.config.flash_dmattn == model.config.flash_dmattn
    assert torch.equal(logits_of(again.eval()), logits_of(model))


def test_windows_of_single_layers_are_saved_and_multiply_the_window_of_load_time(converted, tmp_path):
    model = load(converted, flash_dmattn={"window_shares": {1: 1.5}})
    assert [gate.windows.keep_window_size for gate in gates_of(model)] == [8, 12]
    model.save_pretrained(tmp_path)
    section = json.loads((tmp_path / "config.json").read_text())["flash_dmattn"]
    plain = json.loads((converted / "config.json").read_text())["flash_dmattn"]
    assert section == {**plain, "window_shares": {"1": 1.5}} and "window_shares" not in plain
    again = load(tmp_path)
    assert again.config.flash_dmattn == section and torch.equal(logits_of(again), logits_of(model))
    assert not torch.equal(logits_of(again), logits_of(load(converted)))
    wider = load(tmp_path, flash_dmattn='{"keep_window_size": 10}')
    assert [gate.windows.keep_window_size for gate in gates_of(wider)] == [10, 15]
    for values in ({"window_shares": None}, DynamicMaskConfig(**SMALL)):
        without = load(tmp_path, flash_dmattn=values)
        assert without.config.flash_dmattn == plain and torch.equal(logits_of(without), logits_of(load(converted)))
    with pytest.raises(ValueError, match="window_shares must name layers .* got layer 2: .* no attention with this"):
        load(converted, flash_dmattn={"window_shares": {2: 1.5}})


def test_explicit_other_implementation_warns_and_keeps_the_weights(converted, tmp_path):
    with pytest.warns(UserWarning, match="dense"):
        model = AutoModelForCausalLM.from_pretrained(converted, attn_implementation="eager").eval()
    torch.testing.assert_close(logits_of(model), logits_of(tiny_model("llama")), atol=1e-5, rtol=0)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits_of(load(tmp_path)), logits_of(load(converted)))


def test_set_attn_implementation_both_ways(converted):
    model = load(converted)
    ours, dense = logits_of(model), logits_of(tiny_model("llama"))
    for name, expected in [("sdpa", dense), ("flash_dmattn", ours), ("eager", dense), ("dmattn", ours)]:
        model.set_attn_implementation(name)
        torch.testing.assert_close(logits_of(model), expected, atol=1e-5, rtol=0)


def test_set_attn_implementation_attaches_to_a_plain_model():
    model = tiny_model("llama")
    dense = logits_of(model)
    with dynamic_mask_config(keep_window_size=64), pytest.warns(UserWarning, match="untrained"):
        model.set_attn_implementation("flash_dmattn")
    assert len(gates_of(model)) == 2 and gates_of(model)[0].dt_proj.weight.std() > 0
    assert model.config.flash_dmattn["keep_window_size"] == 64
    torch.testing.assert_close(logits_of(model), dense, atol=1e-5, rtol=0)


LOAD_TIME = {
    "keyword": lambda path: load(path, flash_dmattn={"keep_window_size": 16}),
    "keyword_config": lambda path: load(path, flash_dmattn=DynamicMaskConfig(16)),
    "block": lambda path: _load_in_block(path, keep_window_size=16),
    "config": lambda path: _load_with_config(path, {"keep_window_size": 16}),
}


def _load_in_block(path, **values):
    with dynamic_mask_config(**values):
        return load(path)


def _load_with_config(path, section):
    config = AutoConfig.from_pretrained(path)
    config.flash_dmattn = section
    return load(path, config=config)


@pytest.mark.parametrize("way", LOAD_TIME)
def test_load_time_values(plain, way):
    model = LOAD_TIME[way](plain)
    settings = gates_of(model)[0].config
    assert (settings.keep_window_size, settings.num_sink_tokens, settings.local_window_size) == (16, 4, 12)
    assert model.config.flash_dmattn == settings.to_dict()


def test_load_time_values_override_single_fields_of_a_converted_checkpoint(converted):
    model = load(converted, flash_dmattn={"keep_window_size": 64})
    settings = gates_of(model)[0].config
    assert (settings.keep_window_size, settings.num_sink_tokens, settings.local_window_size) == (64, 2, 3)
    assert gates_of(model)[0].A.abs().max() > 0


def test_a_smaller_window_shrinks_the_local_one_of_a_converted_checkpoint(converted):
    settings = gates_of(load(converted, flash_dmattn={"keep_window_size": 4}))[0].config
    assert (settings.keep_window_size, settings.num_sink_tokens, settings.local_window_size) == (4, 2, 1)
    with dynamic_mask_config(keep_window_size=4):
        settings = gates_of(load(converted))[0].config
    assert (settings.keep_window_size, settings.num_sink_tokens, settings.local_window_size) == (4, 2, 1)
    with pytest.raises(ValueError, match=r"must not exceed keep_window_size, got 2 \+ 3 > 4"):
        load(converted, flash_dmattn={"keep_window_size": 4, "local_window_size": 3})


def test_a_converted_checkpoint_that_was_loaded_without_us_has_to_be_loaded_again(converted):
    code = f"""
import warnings
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(converted)!r})
assert model.config._attn_implementation == "sdpa"
import flash_dmattn_hf
try:
    model.set_attn_implementation("flash_dmattn")
except ValueError as error:
    print(error)
assert model.config._attn_implementation == "sdpa"
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "loaded before flash_dmattn_hf was imported" in done.stdout


def test_from_config_and_direct_constructors_initialise_the_gates():
    config = tiny_config("llama")
    for make in (
        lambda: AutoModelForCausalLM.from_config(copy.deepcopy(config), attn_implementation="flash_dmattn"),
        lambda: LlamaForCausalLM(_ours(config)),
        lambda: LlamaModel(_ours(config)),
    ):
        model = make()
        assert len(gates_of(model)) == 2
        assert all(gate.A.eq(0).all() and gate.dt_proj.weight.std() > 0 for gate in gates_of(model))
        assert model.config.flash_dmattn["num_sink_tokens"] == 4


def _ours(config, **section):
    config = copy.deepcopy(config)
    config._attn_implementation = "flash_dmattn"
    if section:
        config.flash_dmattn = section
    return config


def test_initializer_std_makes_a_random_start():
    model = LlamaForCausalLM(_ours(tiny_config("llama"), keep_window_size=8, initializer_std=0.5))
    assert 0.05 < torch.cat([gate.A for gate in gates_of(model)]).std() < 2


def test_meta_device(converted):
    with torch.device("meta"):
        model = LlamaForCausalLM(AutoConfig.from_pretrained(converted))
    assert all(p.is_meta for gate in gates_of(model) for p in gate.parameters())
    assert len(gates_of(model)) == 2


@pytest.mark.parametrize("kind", ["plain", "converted"])
@pytest.mark.parametrize("placement", ["cpu", "disk"])
def test_device_map(kind, placement, tmp_path, request):
    path = request.getfixturevalue(kind)
    expected = load(path, flash_dmattn=SMALL)
    if placement == "cpu":
        model = load(path, flash_dmattn=SMALL, device_map="cpu")
    else:
        device_map = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"}
        device_map |= {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
        model = load(path, flash_dmattn=SMALL, device_map=device_map, offload_folder=tmp_path)
    if kind == "plain" and placement == "disk":
        assert gates_of(model)[0].A.eq(0).all()
    torch.testing.assert_close(logits_of(model), logits_of(expected), atol=1e-5, rtol=0)


def test_bfloat16_computes_importance_in_float32(converted):
    model = load(converted, dtype=torch.bfloat16)
    gate = gates_of(model)[0]
    assert gate.A.dtype == torch.bfloat16
    value = torch.randn(1, 2, 5, 8, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        importance = gate(value)
    assert importance.dtype == torch.float32
    double = copy.deepcopy(gate).double()(value.double())
    torch.testing.assert_close(importance.double(), double, atol=1e-6, rtol=1e-5)
    assert logits_of(model).isfinite().all()


def test_deepcopy_has_gates_of_its_own(converted):
    model = load(converted)
    twin = copy.deepcopy(model)
    assert torch.equal(logits_of(twin), logits_of(model))
    with torch.no_grad():
        gates_of(twin)[0].A.add_(1)
    assert not torch.equal(logits_of(twin), logits_of(model))
    assert gates_of(twin)[0] is not gates_of(model)[0]


def test_query_head_importance_round_trip(plain, tmp_path):
    model = load(plain, flash_dmattn={**SMALL, "importance_heads": "query", "dt_proj_bias": True})
    randomize(model)
    gate = gates_of(model)[0]
    assert gate.A.shape == (4,) and gate.dt_proj.weight.shape == (4, 16) and gate.dt_proj.bias.shape == (4,)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits_of(AutoModelForCausalLM.from_pretrained(tmp_path).eval()), logits_of(model))


def test_without_bias_the_importance_is_frozen(plain):
    model = load(plain, flash_dmattn={**SMALL, "add_importance_bias": False})
    assert not any(p.requires_grad for gate in gates_of(model) for p in gate.parameters())
    model.train()
    model(tokens(), labels=tokens()).loss.backward()


def damaged(path, tmp_path, *, section=None, change=None):
    """A copy of a checkpoint with another section or other weights."""
    weights, config = load_file(path / "model.safetensors"), json.loads((path / "config.json").read_text())
    config["flash_dmattn"].update(section or {})
    if change:
        change(weights)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


DAMAGES = {
    "missing": {"change": lambda weights: weights.pop("model.layers.1.self_attn.dma.A")},
    "unused": {"section": {"layers": [0]}},
    "heads": {"section": {"importance_heads": "query"}},
    "bias": {"section": {"dt_proj_bias": True}},
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("ignore", [False, True], ids=["strict", "ignore_mismatched_sizes"])
def test_weights_that_do_not_fit_are_an_error(converted, tmp_path, damage, ignore):
    path = damaged(converted, tmp_path, **DAMAGES[damage])
    with pytest.raises((ValueError, RuntimeError), match="dma|mismatch"):
        AutoModelForCausalLM.from_pretrained(path, ignore_mismatched_sizes=ignore)


def config_without_settings(path):
    values = AutoConfig.from_pretrained(path).to_dict()
    del values["flash_dmattn"]
    return LlamaConfig.from_dict(values)


def test_importance_that_a_config_leaves_out_is_a_warning(converted):
    with pytest.warns(UserWarning, match="a config without flash_dmattn: its attention is dense"):
        model = AutoModelForCausalLM.from_pretrained(converted, config=config_without_settings(converted))
    assert gates_of(model) == []


def test_importance_with_the_default_settings_is_a_warning(converted):
    ours = {"config": config_without_settings(converted), "attn_implementation": "flash_dmattn"}
    with pytest.warns(UserWarning, match="without flash_dmattn: it runs with the defaults, {'keep_window_size': 2048"):
        AutoModelForCausalLM.from_pretrained(converted, **ours)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        AutoModelForCausalLM.from_pretrained(converted, flash_dmattn=SMALL, **ours)


def test_no_settings_given_at_load_time_change_nothing(converted):
    assert load(converted, None, flash_dmattn=None).config.flash_dmattn == load(converted).config.flash_dmattn
    assert AutoConfig.from_pretrained(converted, flash_dmattn=None).flash_dmattn["keep_window_size"] == 8


def test_unknown_keys_in_a_section_are_an_error(converted, tmp_path):
    path = damaged(converted, tmp_path, section={"keep_window": 5, "sinks": 1})
    with pytest.raises(ValueError, match=r"got \['keep_window', 'sinks'\]"):
        AutoModelForCausalLM.from_pretrained(path)


def test_unknown_load_time_values_are_an_error(plain):
    with pytest.raises(ValueError, match="window_size"):
        load(plain, flash_dmattn={"window_size": 5})
    with pytest.raises(ValueError, match="dict"):
        load(plain, flash_dmattn=512)


def test_a_plan_in_one_process_splits_nothing(plain):
    model = load(plain, tp_plan="auto")
    assert len(list(iter_gates(model))) == 2
    assert torch.equal(model(tokens()).logits, load(plain)(tokens()).logits)


def test_a_model_that_was_never_converted_stays_untouched(plain):
    model = AutoModelForCausalLM.from_pretrained(plain)
    assert model.config._attn_implementation == "sdpa"
    assert not gates_of(model) and not hasattr(model.config, "flash_dmattn")


def test_vision_tower_keeps_its_own_attention(tmp_path):
    model = tiny_model("llava")
    model.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ours = type(model).from_pretrained(tmp_path, attn_implementation="flash_dmattn").eval()
    assert ours.config.text_config._attn_implementation == "flash_dmattn"
    assert ours.config.vision_config._attn_implementation == "sdpa"
    inputs = {"input_ids": tokens(), "pixel_values": torch.randn(2, 3, 16, 16)}
    inputs["input_ids"][:, 2:6] = 98
    with torch.no_grad():
        torch.testing.assert_close(ours(**inputs).logits, model(**inputs).logits, atol=1e-5, rtol=0)
    ours.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert again.config.text_config.flash_dmattn == ours.config.text_config.flash_dmattn
    assert again.config.text_config._attn_implementation == "flash_dmattn"
    again.set_attn_implementation("eager")
    again.set_attn_implementation("flash_dmattn")
    assert again.config.vision_config._attn_implementation == "eager"


def test_layers_selects_layers(plain):
    model = load(plain, flash_dmattn={**SMALL, "layers": [1]})
    assert [name for name, _, _ in iter_gates(model)] == ["model.layers.1.self_attn"]
    assert logits_of(model).isfinite().all()


def test_config_class_is_untouched():
    assert not hasattr(LlamaConfig(), "flash_dmattn")
