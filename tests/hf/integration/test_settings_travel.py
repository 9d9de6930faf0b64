"""Settings given at load time: saved with adapters, missed when a path is loaded once more, given as strings."""

import gc
import json
import warnings

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
)

from flash_dmattn_hf import DynamicMaskConfig, dynamic_mask_config, iter_gates
from flash_dmattn_hf.integration.lost_settings import warn_if_lost

from ..tiny import tiny_model, tokens

OURS = {"attn_implementation": "flash_dmattn"}
SMALL = {"keep_window_size": 8, "num_sink_tokens": 2, "local_window_size": 3}
LENGTH = 30


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """A directory with a dense checkpoint."""
    path = tmp_path_factory.mktemp("dense")
    tiny_model("llama").save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def composite(tmp_path_factory):
    """A directory with a dense checkpoint of text and vision."""
    path = tmp_path_factory.mktemp("composite")
    text = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = {**text, "image_size": 16, "patch_size": 8}
    sizes = {"vocab_size": 64, "num_key_value_heads": 2, "head_dim": 16, "layer_types": ["full_attention"]}
    config = Gemma3Config(text_config={**text, **sizes}, vision_config=vision, mm_tokens_per_image=4)
    Gemma3ForConditionalGeneration(config).save_pretrained(path)
    return path


def load(path, **options):
    """Loads a model quietly."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return AutoModelForCausalLM.from_pretrained(path, **options).eval()


def add_adapter(model, config):
    """Adds an adapter by transformers' own method, if it takes the PEFT that is installed."""
    try:
        model.add_adapter(config)
    except ValueError as error:
        if "version of PEFT" not in str(error):
            raise
        pytest.skip(str(error))


def window_of(model):
    """The windows of all gates, which must be the same."""
    (window,) = {gate.windows.keep_window_size for _, _, gate in iter_gates(model)}
    return window


@torch.no_grad()
def logits_of(model):
    return model(tokens(2, LENGTH)).logits


def said(record):
    return [str(entry.message) for entry in record if "flash_dmattn={" in str(entry.message)]


@pytest.fixture(scope="module")
def adapter(dense, tmp_path_factory):
    """A directory with an adapter that was trained with small windows, gates and all, and the logits with it."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["dma"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(load(dense, **OURS, flash_dmattn=SMALL), config).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.rand_like(parameter))
    path = tmp_path_factory.mktemp("adapter")
    model.save_pretrained(path)
    return path, logits_of(model)


def test_an_adapter_brings_its_settings_to_a_plain_model(adapter):
    peft = pytest.importorskip("peft")
    path, expected = adapter
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        model = peft.AutoPeftModelForCausalLM.from_pretrained(path).eval()
    assert not said(record) and not [entry for entry in record if "untrained" in str(entry.message)]
    assert window_of(model) == 8 and torch.equal(logits_of(model), expected)
    assert window_of(model.merge_and_unload()) == 8


def test_transformers_itself_loads_the_adapter_with_its_settings(adapter):
    path, expected = adapter
    if Version(transformers.__version__) < Version("5.23"):  # it takes the names of PEFT's modules_to_save for others
        with pytest.raises(ValueError, match="must fit .* but it has unused model.layers"):
            load(path)
        return
    model = load(path)
    assert window_of(model) == 8 and torch.equal(logits_of(model), expected)


def test_an_adapter_added_by_transformers_has_its_settings_too(dense, tmp_path):
    peft = pytest.importorskip("peft")
    model = load(dense, **OURS, flash_dmattn=SMALL)
    add_adapter(model, peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert window_of(again) == 8
    (tmp_path / "flash_dmattn.json").unlink()
    assert not any(iter_gates(load(tmp_path)))


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({**OURS, "flash_dmattn": {**SMALL, "keep_window_size": 16}}, "has {'keep_window_size': 16}"),
        ({"attn_implementation": "sdpa"}, 'runs with attn_implementation="sdpa"'),
    ],
    ids=["another window", "dense by choice"],
)
def test_a_model_that_was_chosen_otherwise_keeps_its_settings_and_warns(dense, adapter, options, problem):
    peft = pytest.importorskip("peft")
    base = load(dense, **options)
    with pytest.warns(UserWarning, match="was trained with flash_dmattn={'keep_window_size': 8") as record:
        peft.PeftModel.from_pretrained(base, adapter[0])
    (message,) = said(record)
    assert problem in message and message.endswith("'local_window_size': 3}")


def test_a_second_adapter_is_compared_as_well(dense, adapter, tmp_path):
    peft = pytest.importorskip("peft")
    other = peft.get_peft_model(
        load(dense, **OURS, flash_dmattn={"keep_window_size": 12}),
        peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"),
    )
    other.save_pretrained(tmp_path)
    model = peft.AutoPeftModelForCausalLM.from_pretrained(adapter[0])
    with pytest.warns(UserWarning, match="'keep_window_size': 12.* has {'keep_window_size': 8"):
        model.load_adapter(tmp_path, "second")


def test_an_edit_of_the_config_reaches_the_gates_of_an_adapter(dense, tmp_path):
    """PEFT trains copies of the gates."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["dma"], task_type="CAUSAL_LM")
    model = load(dense, **OURS, flash_dmattn=SMALL)
    wrapped, before = peft.get_peft_model(model, config).eval(), SMALL["keep_window_size"]
    assert window_of(wrapped) == before
    model.config.flash_dmattn = {**model.config.flash_dmattn, "keep_window_size": before + 4}
    assert window_of(wrapped) == before + 4
    wrapped.save_pretrained(tmp_path)
    again = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(logits_of(again), logits_of(wrapped), atol=1e-5, rtol=1e-5)


def test_an_adapter_of_a_dense_model_leaves_no_settings(dense, tmp_path):
    peft = pytest.importorskip("peft")
    (tmp_path / "flash_dmattn.json").write_text(json.dumps(SMALL))
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    peft.get_peft_model(load(dense), config).save_pretrained(tmp_path)
    assert not any(iter_gates(peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path)))


def test_an_adapter_is_saved_by_positional_arguments(dense, tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(load(dense, **OURS, flash_dmattn=SMALL), config)
    model.add_adapter("second", config)
    model.save_pretrained(tmp_path, True, ["second"])
    assert [path.name for path in tmp_path.rglob("*.json") if path.name == "flash_dmattn.json"] == ["flash_dmattn.json"]
    assert (tmp_path / "second" / "flash_dmattn.json").exists()
    model = load(dense, **OURS, flash_dmattn=SMALL)
    add_adapter(model, config)
    model.save_pretrained(tmp_path / "other", False)
    assert not (tmp_path / "other" / "flash_dmattn.json").exists()


def test_an_adapter_without_weights_of_the_importance_warns(dense, tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    peft.get_peft_model(load(dense, **OURS, flash_dmattn=SMALL), config).save_pretrained(tmp_path)
    for load_again in (peft.AutoPeftModelForCausalLM.from_pretrained, AutoModelForCausalLM.from_pretrained):
        with pytest.warns(UserWarning, match=r'no weights of the importance.*modules_to_save=\["dma"\]'):
            load_again(tmp_path)


def test_a_place_without_an_adapter_fails_as_without_us(dense, tmp_path):
    peft = pytest.importorskip("peft")
    for place in (tmp_path, tmp_path / "nothing", "not/a/repository"):
        with pytest.raises((OSError, ValueError)) as plain:
            peft.PeftModel.from_pretrained.__func__.__wrapped__(peft.PeftModel, load(dense), place)
        with pytest.raises(plain.type) as ours:
            peft.PeftModel.from_pretrained(load(dense), place)
        assert str(ours.value) == str(plain.value)


def test_a_folder_is_not_looked_up_elsewhere(dense, adapter, monkeypatch):
    peft = pytest.importorskip("peft")
    monkeypatch.setattr("flash_dmattn_hf.integration.adapters.cached_file", None)
    assert window_of(peft.PeftModel.from_pretrained(load(dense), adapter[0])) == 8


def test_a_checkpoint_saved_from_load_time_settings_reloads_with_them(dense, tmp_path):
    model = load(dense, **OURS, flash_dmattn=SMALL)
    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert window_of(again) == 8 and torch.equal(logits_of(again), logits_of(model))


def test_a_path_loaded_once_more_without_its_settings_warns(dense):
    policy = load(dense, **OURS, flash_dmattn=SMALL)
    with pytest.warns(UserWarning, match="is in use with flash_dmattn=") as record:
        AutoModelForCausalLM.from_pretrained(dense, **OURS)
    (message,) = said(record)
    assert f"{SMALL}, and was loaded once more with {{'keep_window_size': 2048" in message
    assert 'model_init_kwargs={"attn_implementation": "flash_dmattn", "flash_dmattn": {' in message
    assert window_of(policy) == 8


@pytest.mark.parametrize("options", [{}, {**OURS, "flash_dmattn": {"keep_window_size": 12}}], ids=["dense", "chosen"])
def test_a_path_loaded_otherwise_on_purpose_does_not_warn(dense, options):
    policy = load(dense, **OURS, flash_dmattn=SMALL)
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        AutoModelForCausalLM.from_pretrained(dense, **options)
        del policy
        gc.collect()  # a model has cycles
        AutoModelForCausalLM.from_pretrained(dense, **OURS)
    assert not said(record)


def test_a_config_with_settings_gives_them(dense):
    policy = load(dense, **OURS, flash_dmattn=SMALL)
    config = AutoConfig.from_pretrained(dense)
    config.flash_dmattn = DynamicMaskConfig(keep_window_size=12).to_dict()
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        model = AutoModelForCausalLM.from_pretrained(dense, config=config, **OURS)
    assert not said(record) and [window_of(model), window_of(policy)] == [12, 8]


def test_a_converted_path_loaded_once_more_without_its_settings_warns(dense, tmp_path):
    load(dense, **OURS, flash_dmattn=SMALL).save_pretrained(tmp_path)
    policy = load(tmp_path, flash_dmattn={"keep_window_size": 12})
    with pytest.warns(UserWarning, match="loaded once more with {'keep_window_size': 8}"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    assert window_of(policy) == 12


def test_windows_of_single_layers_that_were_lost_are_named(dense, tmp_path):
    load(dense, **OURS, flash_dmattn=SMALL).save_pretrained(tmp_path)
    policy = load(tmp_path, flash_dmattn={"window_shares": {1: 1.5}})
    with pytest.warns(UserWarning, match="'window_shares': {'1': 1.5}.*once more with {'window_shares': None}"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    policy.config.flash_dmattn = {**SMALL}
    plain = load(tmp_path)
    plain.config.flash_dmattn = {**plain.config.flash_dmattn, "window_shares": {"1": 1.5}}
    with pytest.warns(UserWarning, match="once more with .*'window_shares': {'1': 1.5}"):
        warn_if_lost(plain)


def test_an_adapter_brings_the_windows_of_single_layers(dense, tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["dma"], task_type="CAUSAL_LM")
    trained = load(dense, **OURS, flash_dmattn={**SMALL, "window_shares": {1: 1.5}})
    peft.get_peft_model(trained, config).save_pretrained(tmp_path)
    model = peft.PeftModel.from_pretrained(load(dense), tmp_path)
    assert [gate.windows.keep_window_size for _, _, gate in iter_gates(model)] == [8, 12]
    with pytest.warns(UserWarning, match="has {'window_shares': None}"):
        peft.PeftModel.from_pretrained(load(dense, **OURS, flash_dmattn=SMALL), tmp_path)


def test_a_section_with_some_of_the_settings_is_compared(dense):
    policy, again = load(dense, **OURS, flash_dmattn=SMALL), load(dense, **OURS)
    again.config.flash_dmattn = {"keep_window_size": 12}
    with pytest.warns(UserWarning, match="loaded once more with {'keep_window_size': 12"):
        warn_if_lost(again)
    policy.config.flash_dmattn = dict(SMALL)
    again.config.flash_dmattn = DynamicMaskConfig(**SMALL).to_dict()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_if_lost(again)


@pytest.mark.parametrize("separator", [",", ";"])
def test_settings_may_be_a_string(dense, separator):
    text = json.dumps(SMALL).replace(",", separator)
    assert window_of(load(dense, **OURS, flash_dmattn=text)) == 8


def test_a_string_changes_the_settings_of_a_checkpoint(dense, tmp_path):
    load(dense, **OURS, flash_dmattn=SMALL).save_pretrained(tmp_path)
    assert window_of(load(tmp_path, flash_dmattn='{"keep_window_size": 6}')) == 6


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ('{"keep_window_size": 16', 'must be a JSON object.*write ";" between'),
        ("[1]", "must be a dict of settings, got list"),
        (16, "must be a dict of settings, got int 16"),
    ],
)
def test_other_strings_are_refused(dense, value, words):
    with pytest.raises(ValueError, match=words):
        AutoModelForCausalLM.from_pretrained(dense, **OURS, flash_dmattn=value)


def test_the_settings_that_were_chosen():
    assert DynamicMaskConfig().chosen() == {}
    assert DynamicMaskConfig(**SMALL).chosen() == SMALL


@pytest.mark.parametrize("vision", [None, "eager"])
@pytest.mark.parametrize("is_loaded", [True, False], ids=["loaded", "set"])
def test_ours_for_the_whole_of_a_composite_model(composite, vision, is_loaded):
    chosen = {"": "flash_dmattn", **({"vision_config": vision} if vision else {})}
    with warnings.catch_warnings(), dynamic_mask_config(**SMALL):
        warnings.simplefilter("ignore")
        options = {"attn_implementation": chosen} if is_loaded else {}
        model = AutoModelForImageTextToText.from_pretrained(composite, **options)
        if not is_loaded:
            model.set_attn_implementation(chosen)
    parts = model.config.text_config, model.config.vision_config
    assert [part._attn_implementation for part in parts] == ["flash_dmattn", vision or "sdpa"]
    assert window_of(model) == 8


@pytest.mark.parametrize(
    ("chosen", "text"),
    [({"": "eager"}, "flash_dmattn"), ({"text_config": "eager"}, "eager"), ("eager", "eager")],
    ids=str,
)
def test_a_converted_composite_model_warns_where_its_text_part_is_dense(composite, tmp_path, chosen, text):
    load_composite = AutoModelForImageTextToText.from_pretrained
    load_composite(composite, attn_implementation="flash_dmattn", flash_dmattn=SMALL).save_pretrained(tmp_path)
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        model = load_composite(tmp_path, attn_implementation=chosen)
    assert model.config.text_config._attn_implementation == text
    assert any("its attention is dense" in str(entry.message) for entry in record) == (text == "eager")
