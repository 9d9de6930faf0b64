"""The importance as files of its own: it comes back whole, and what does not fit is refused in one sentence."""

import copy
import json
import os
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from flash_dmattn_hf import DynamicMaskConfig, convert_model, iter_gates, load_importance, save_importance
from flash_dmattn_hf.cli import main
from flash_dmattn_hf.conversion import importance_file
from flash_dmattn_hf.conversion.importance_file import HEADER, WEIGHTS, read_importance

from ..cli_models import save_dense
from ..tiny import tiny_model, tokens

EXAMPLE = Path(__file__).resolve().parents[3] / "examples" / "importance_smollm2_135m"
SETTINGS = {"keep_window_size": 16, "num_sink_tokens": 2, "local_window_size": 5}
KINDS = {
    "values": {},
    "hidden states": {"importance_input": "hidden"},
    "query heads with bias": {"importance_heads": "query", "dt_proj_bias": True, "importance": "zoh"},
    "no importance bias": {"add_importance_bias": False},
    "one layer": {"layers": (1,)},
    "windows of single layers": {"window_shares": {1: 1.5}},
}


def with_importance(model_type="llama", *, seed=0, **values):
    """A converted model whose importance is far from zero; its dense weights do not depend on the values."""
    model = convert_model(tiny_model(model_type, initializer_range=0.3), {**SETTINGS, **values})
    torch.manual_seed(seed)
    with torch.no_grad():
        for _, _, gate in iter_gates(model):
            for parameter in gate.parameters():
                parameter.normal_()
    return model


def dense_model(model_type="llama", **overrides):
    return tiny_model(model_type, initializer_range=0.3, **overrides)


@torch.no_grad()
def logits_of(model):
    return model(input_ids=tokens(2, 40), use_cache=False).logits


def snapshot(model):
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trainable = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    return weights, trainable, model.config.get_text_config().to_dict(), model.config._attn_implementation


def same(before, after):
    weights = before[0].keys() == after[0].keys() and all(torch.equal(before[0][n], after[0][n]) for n in before[0])
    return weights and before[1:] == after[1:]


@pytest.fixture
def saved(tmp_path):
    save_importance(with_importance(), tmp_path / "importance", base_model="some/model")
    return tmp_path / "importance"


@pytest.mark.parametrize("values", KINDS.values(), ids=KINDS)
def test_a_dense_model_becomes_the_one_that_was_saved(values, tmp_path):
    model = with_importance(**values)
    save_importance(model, tmp_path)
    assert sorted(os.listdir(tmp_path)) == [HEADER, WEIGHTS]
    loaded = dense_model()
    assert load_importance(loaded, tmp_path) is loaded
    assert torch.equal(logits_of(loaded), logits_of(model))
    assert not torch.allclose(logits_of(loaded), logits_of(dense_model()), atol=1e-3)
    assert same(snapshot(loaded), snapshot(model))
    report = loaded.flash_dmattn_report
    assert report.parameters_added == sum(p.numel() for _, _, gate in iter_gates(model) for p in gate.parameters())
    assert f"importance  from {tmp_path}" in str(report) and "all keys tie" not in str(report)


@pytest.mark.parametrize("model_type", ["gemma2", "gpt2", "qwen3_next", "llava"])
def test_families(model_type, tmp_path):
    model = with_importance(model_type, importance_input="hidden")
    save_importance(model, tmp_path)
    assert torch.equal(logits_of(load_importance(dense_model(model_type), tmp_path)), logits_of(model))


@pytest.mark.parametrize("values", KINDS.values(), ids=KINDS)
def test_a_converted_model_takes_settings_and_importance(values, tmp_path):
    model = with_importance(**values)
    save_importance(model, tmp_path)
    other = {"keep_window_size": 30, "num_sink_tokens": 0, "local_window_size": 3, "add_importance_bias": True}
    if "importance" not in values:
        other["importance"] = "zoh"
    loaded = with_importance(seed=1, **{**values, **other})
    assert not torch.allclose(logits_of(loaded), logits_of(model), atol=1e-3)
    loaded.set_attn_implementation("sdpa")
    gates = [gate for _, _, gate in iter_gates(loaded)]
    load_importance(loaded, tmp_path)
    assert [gate for _, _, gate in iter_gates(loaded)] == gates
    assert torch.equal(logits_of(loaded), logits_of(model))
    assert same(snapshot(loaded), snapshot(model))
    loaded.save_pretrained(tmp_path / "checkpoint")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint")
    assert torch.equal(logits_of(again.eval()), logits_of(model))


def test_shares_of_a_layer_without_a_gate_are_refused(saved):
    header = json.loads((saved / HEADER).read_text())
    assert "window_shares" not in header["settings"]
    (saved / HEADER).write_text(json.dumps({**header, "settings": {**header["settings"], "window_shares": {"2": 2}}}))
    for model in (dense_model(), with_importance(seed=1)):
        before = snapshot(model)
        with pytest.raises(ValueError, match="window_shares must name layers with an importance gate, got layer 2"):
            load_importance(model, saved)
        assert same(before, snapshot(model))


def test_a_bfloat16_model_takes_a_float32_importance(saved):
    model = load_importance(dense_model().bfloat16(), saved)
    gate = next(iter_gates(model))[2]
    assert torch.equal(gate.A, load_file(saved / WEIGHTS)["layers.0.A"].bfloat16())


def test_a_file_of_half_the_size(tmp_path):
    model = with_importance()
    save_importance(model, tmp_path, dtype=torch.bfloat16)
    loaded, (_, _, gate) = load_importance(dense_model(), tmp_path), next(iter_gates(model))
    assert {tensor.dtype for tensor in load_file(tmp_path / WEIGHTS).values()} == {torch.bfloat16}
    assert torch.equal(next(iter_gates(loaded))[2].dt_proj.weight, gate.dt_proj.weight.bfloat16().float())


@pytest.mark.parametrize("with_copy", [True, False], ids=["modules_to_save", "adapters only"])
def test_peft_models_save_and_load_their_active_copy(with_copy, tmp_path):
    modules = {"modules_to_save": ["dma"]} if with_copy else {}
    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", **modules)
    model = get_peft_model(with_importance(), lora)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".dma." in name and ("modules_to_save" in name or not with_copy):
                parameter.add_(1.0)
    save_importance(model, tmp_path)
    assert torch.equal(logits_of(load_importance(dense_model(), tmp_path)), logits_of(model))
    other = get_peft_model(with_importance(seed=1), lora)
    trainable = {name: parameter.requires_grad for name, parameter in other.named_parameters()}
    assert load_importance(other, tmp_path) is other
    assert torch.equal(logits_of(other), logits_of(model))
    assert {name: parameter.requires_grad for name, parameter in other.named_parameters()} == trainable


def test_wrappers_are_looked_through(tmp_path):
    model = with_importance()
    save_importance(torch.compile(model), tmp_path)
    assert torch.equal(logits_of(load_importance(dense_model(), tmp_path)), logits_of(model))


def test_the_header_names_the_base_model_and_its_architecture(saved, tmp_path):
    header = json.loads((saved / HEADER).read_text())
    assert header["base_model"] == "some/model" and len(header["architecture_sha256"]) == 64
    assert header["architecture"]["model_type"] == "llama" and header["architecture"]["hidden_size"] == 32
    assert header["settings"] == with_importance().config.flash_dmattn
    assert {name.split(".", 2)[2] for name in load_file(saved / WEIGHTS)} == {"A", "dt_proj.weight"}
    dense_model().save_pretrained(tmp_path / "base")
    model = convert_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), SETTINGS)
    save_importance(model, tmp_path / "named")
    assert json.loads((tmp_path / "named" / HEADER).read_text())["base_model"] == str(tmp_path / "base")


def test_an_interrupted_save_leaves_the_files_before(saved, monkeypatch):
    before = {path.name: path.read_bytes() for path in saved.iterdir()}

    def interrupt(tensors, path):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(importance_file, "save_file", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save_importance(with_importance(seed=1), saved)
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before


OTHER_MODELS = {
    "deeper": ({"num_hidden_layers": 3}, "belongs to some/model: model must have num_hidden_layers 2, got 3"),
    "wider": ({"hidden_size": 64}, "belongs to some/model: model must have hidden_size 32, got 64"),
    "other heads": ({"num_key_value_heads": 4}, "model must have num_key_value_heads 2, got 4"),
    "other head dim": ({"head_dim": 16}, r"must have {'A': .*\(2, 32\)} in layer 0, got .*16\)"),
}


@pytest.mark.parametrize("overrides, message", OTHER_MODELS.values(), ids=OTHER_MODELS)
def test_another_model_is_refused(overrides, message, saved):
    model = dense_model(**overrides)
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        load_importance(model, saved)
    assert same(snapshot(model), before) and not list(iter_gates(model))


def test_another_family_is_refused(saved):
    with pytest.raises(ValueError, match="model must have model_type llama, got qwen2"):
        load_importance(dense_model("qwen2"), saved)


OTHER_CONVERSIONS = {
    "heads": ({"importance_heads": "query"}, "converted with importance_heads='query', but the importance has 'kv'"),
    "input": ({"importance_input": "hidden"}, "converted with importance_input='hidden', but .* 'value': load it into"),
    "bias": ({"dt_proj_bias": True}, "converted already must have .*dt_proj.weight.* in layer 0, got .*dt_proj.bias"),
    "layers": ({"layers": (1,)}, r"converted already must be of layers \[0, 1\], got \[1\]"),
}


@pytest.mark.parametrize("values, message", OTHER_CONVERSIONS.values(), ids=OTHER_CONVERSIONS)
def test_a_model_that_was_converted_otherwise_is_refused(values, message, saved):
    model = with_importance(**values)
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        load_importance(model, saved)
    assert same(snapshot(model), before)


def change_header(path, **values):
    header = json.loads((path / HEADER).read_text())
    header.update(values)
    (path / HEADER).write_text(json.dumps(header))


def change_weights(path, change):
    weights = load_file(path / WEIGHTS)
    change(weights)
    save_file(weights, path / WEIGHTS)


def put_pickle(path):
    (path / WEIGHTS).rename(path / "importance.bin")


def truncate(path):
    content = (path / WEIGHTS).read_bytes()
    (path / WEIGHTS).write_bytes(content[: len(content) // 2])


DAMAGE = {
    "no header": (lambda path: (path / HEADER).unlink(), "must contain importance.safetensors and importance.json$"),
    "no weights": (lambda path: (path / WEIGHTS).unlink(), "must contain importance.safetensors and importance.json$"),
    "pickle": (put_pickle, "importance.bin is a pickle, which could hide code and is never read"),
    "truncated": (truncate, "importance.safetensors must be a whole safetensors file"),
    "no json": (lambda path: (path / HEADER).write_text("{"), "importance.json must be JSON"),
    "no dict": (lambda path: (path / HEADER).write_text("[]"), "importance.json must have format 1"),
    "newer format": (lambda path: change_header(path, format=2), "importance.json must have format 1"),
    "lacks a field": (lambda path: (path / HEADER).write_text('{"format": 1}'), "but lacks 'settings'"),
    "architecture": (lambda path: change_header(path, architecture=3), "must have an architecture of names and values"),
    "hash": (lambda path: change_header(path, architecture_sha256="0"), "must be as save_importance wrote it"),
    "settings": (lambda path: change_header(path, settings={"window": 3}), "must only have the keys"),
    "layer missing": (
        lambda path: change_weights(path, lambda w: [w.pop(f"layers.1.{n}") for n in ("A", "dt_proj.weight")]),
        r"must be of layers \[0, 1\], got \[0\]",
    ),
    "parameter missing": (lambda path: change_weights(path, lambda w: w.pop("layers.1.A")), "in layer 1, got"),
    "misshapen": (lambda path: change_weights(path, lambda w: w.update({"layers.1.A": torch.ones(3)})), r"'A': \(3,\)"),
    "other tensors": (lambda path: change_weights(path, lambda w: w.update(A=torch.ones(3))), "must only hold tensors"),
}


@pytest.mark.parametrize("damage, message", DAMAGE.values(), ids=DAMAGE)
def test_damage_is_named(damage, message, saved):
    damage(saved)
    model = dense_model()
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        load_importance(model, saved)
    assert same(snapshot(model), before)


def test_what_has_no_importance_of_ours_is_refused(saved, tmp_path):
    with pytest.raises(ValueError, match="must be a directory of save_importance, got .*nowhere"):
        load_importance(dense_model(), tmp_path / "nowhere")
    with pytest.raises(ValueError, match="must have dynamic masks, got LlamaForCausalLM without any"):
        save_importance(dense_model(), tmp_path / "out")
    doge = tiny_model("doge", head_dim=8)
    doge.set_attn_implementation("flash_dmattn")
    for use in (lambda: save_importance(doge, tmp_path / "out"), lambda: load_importance(doge, saved)):
        with pytest.raises(ValueError, match="DogeForCausalLM has an importance of its own"):
            use()
    with pytest.raises(ValueError, match="model must be a model of transformers, got Linear"):
        load_importance(torch.nn.Linear(2, 2), saved)
    meta = copy.deepcopy(with_importance()).to("meta")
    with pytest.raises(ValueError, match="A of layer 0 must be in memory as a whole"):
        save_importance(meta, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command_line_converts_with_a_trained_importance(tmp_path, capsys):
    dense = save_dense(tmp_path / "dense")
    model = convert_model(AutoModelForCausalLM.from_pretrained(dense), DynamicMaskConfig(**SETTINGS))
    with torch.no_grad():
        for _, _, gate in iter_gates(model):
            gate.A.normal_()
    save_importance(model, tmp_path / "importance")
    for source, out in ((dense, "out"), (tmp_path / "out", "again")):
        assert main(["convert", str(source), str(tmp_path / out), "--importance", str(tmp_path / "importance")]) == 0
        assert f"importance  from {tmp_path / 'importance'}" in capsys.readouterr().out
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / out)
        assert torch.equal(logits_of(loaded.eval()), logits_of(model.eval()))


def test_the_example_fits_its_model():
    """Its weights are left as they are in memory: only shapes and settings are to be seen."""
    saved = read_importance(EXAMPLE)
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**saved.architecture))
    model = load_importance(model.to_empty(device="cpu"), EXAMPLE)
    gates = {gate.layer_idx: gate for _, _, gate in iter_gates(model)}
    assert gates.keys() == saved.tensors.keys() == set(range(30))
    for layer_idx, gate in gates.items():
        assert gate.config.keep_window_size == 512
        for name, tensor in saved.tensors[layer_idx].items():
            assert torch.equal(gate.get_parameter(name), tensor.float())
    assert (EXAMPLE / "importance.safetensors").stat().st_size < 200_000
