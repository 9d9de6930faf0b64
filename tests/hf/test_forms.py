"""An importance form is one entry of one table: what reads the table takes a new one."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from flash_dmattn_hf import DynamicMaskConfig, convert_model, iter_gates
from flash_dmattn_hf.cli import main
from flash_dmattn_hf.conversion.calibration import BIAS_SPREAD, Calibration
from flash_dmattn_hf.forms import DEFAULT_FORM, FORMS, PAPER_FORM, ImportanceForm

from .cli_models import save_dense
from .dense_definition import by_definition
from .generation_models import greedy, make_prompt
from .tiny import tiny_model, tokens

REFERENCE = Path(__file__).resolve().parents[2] / "docs" / "api_reference.md"
SETTINGS = {"keep_window_size": 12, "num_sink_tokens": 1, "local_window_size": 4}


@pytest.fixture
def linear(monkeypatch):
    """A * dt, added to the table and nowhere else."""
    monkeypatch.setitem(FORMS, "linear", ImportanceForm("A * dt", lambda A, dt: A * dt))
    return {"importance": "linear", **SETTINGS}


def spread(model):
    """Gives the importance of a model random parameters."""
    generator = torch.Generator().manual_seed(1)
    for _, _, gate in iter_gates(model):
        for parameter in gate.parameters():
            torch.nn.init.normal_(parameter, std=0.7, generator=generator)
    return model


@pytest.mark.parametrize("name", FORMS)
def test_the_reference_names_every_form(name):
    assert f'"{name}"' in REFERENCE.read_text()


@pytest.mark.parametrize("name", FORMS)
def test_a_form_is_its_formula(name):
    """Read as Python, with the functions of torch."""
    A, dt = torch.randn(3, 1, dtype=torch.float64), torch.randn(2, 3, 5, dtype=torch.float64)
    names = {"A": A, "dt": dt, "exp": torch.exp, "softplus": torch.nn.functional.softplus}
    torch.testing.assert_close(FORMS[name](A, dt), eval(FORMS[name].formula, names))
    score = FORMS[name].score(torch.ones(1, 1), torch.linspace(-20, 20, 1001).view(1, 1, -1))
    assert (score.diff() > 0).all() and not FORMS[name].score(0 * A, dt).any()


@pytest.mark.parametrize("name", FORMS)
@torch.no_grad()
def test_a_model_of_a_form_equals_its_definition(name):
    model = spread(convert_model(tiny_model("llama", dtype=torch.float64), {"importance": name, **SETTINGS}).double())
    found = model(tokens(2, 40)).logits
    with by_definition(model):
        torch.testing.assert_close(found, model(tokens(2, 40)).logits)


def test_what_is_chosen_without_a_word():
    assert DynamicMaskConfig().importance == DEFAULT_FORM == "log_zoh" and PAPER_FORM == "zoh"


def test_an_unknown_form_is_refused_by_name(linear):
    with pytest.raises(ValueError, match=r"importance must be one of \['zoh', 'log_zoh', 'linear'\], got 'cubic'"):
        DynamicMaskConfig(importance="cubic")


def test_a_new_form_is_computed_saved_and_reloaded(linear, tmp_path):
    model = spread(convert_model(tiny_model("llama"), linear))
    for _, _, gate in iter_gates(model):
        value = torch.randn(2, gate.num_kv_heads, 5, gate.head_dim)
        dt = value.transpose(1, 2).flatten(2) @ gate.dt_proj.weight.T
        torch.testing.assert_close(gate(value), (gate.A * dt).transpose(1, 2))
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.config.flash_dmattn["importance"] == "linear"
    assert torch.equal(again(tokens()).logits, model(tokens()).logits)


def test_a_new_form_generates_with_a_cache_what_it_does_without(linear):
    model = spread(convert_model(tiny_model("llama", dtype=torch.float64), linear)).double()
    ids, mask = make_prompt(batch=2)
    found = greedy(model, ids, mask)
    assert found.tolist() == greedy(model, ids, mask, use_cache=False).tolist()
    dense = greedy(tiny_model("llama", dtype=torch.float64), ids, mask)
    assert found.tolist() != dense.tolist(), "nothing depends on the window"


def test_a_new_form_starts_where_it_says(monkeypatch):
    monkeypatch.setitem(FORMS, "shifted", ImportanceForm("A * dt", lambda A, dt: A * dt, initial_A=0.25))
    model = convert_model(tiny_model("llama"), {"importance": "shifted", **SETTINGS})
    assert all((gate.A == 0.25).all() for _, _, gate in iter_gates(model))


def test_a_new_form_is_calibrated(linear):
    """A stays so small that no two tokens of the text differ by more than the allowed bias."""
    model, text = tiny_model("llama", initializer_range=0.3), tokens(1, 1600)
    convert_model(model, linear, calibration=Calibration(text, stretch_length=160))
    spreads = []
    for _, _, gate in iter_gates(model):
        gate.register_forward_hook(lambda gate, args, out: spreads.append(out.amax((0, 2)) - out.amin((0, 2))))
    model(text[:, :160])
    assert all(((0 < spread) & (spread <= 2 * BIAS_SPREAD)).all() for spread in spreads) and len(spreads) == 2


def test_the_command_line_offers_a_new_form(linear, tmp_path):
    dense = save_dense(tmp_path / "dense")
    options = ["--keep-window-size", "24", "--importance-form", "linear"]
    assert main(["convert", str(dense), str(tmp_path / "out"), *options]) == 0
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.flash_dmattn["importance"] == "linear"
