"""scripts/compare_recipes.py: every recipe from the same start, on the same questions, with its own log."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from flash_dmattn_hf.training.recipe import Recipe

from ..cli_models import save_dense

SCRIPT = Path(__file__).resolve().parents[3] / "scripts" / "compare_recipes.py"
ALL = "{keep_window_size: 64, length: 320, batch_size: 1, steps: 20, importance_share: 0.5, evaluations: 0}"
ASKED = "--samples 1 --stretches 2 --depths 20 --tasks pass_key --device cpu"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("recipes")
    save_dense(place / "dense")
    generator = torch.Generator().manual_seed(0)
    torch.save(
        {name: torch.randint(5, 60, (17000,), generator=generator) for name in ("train", "test")}, place / "tok.pt"
    )
    return place


def run(place, *recipes, options=()):
    given = [part for recipe in recipes for part in ("--recipe", recipe)]
    command = [sys.executable, SCRIPT, "--base", "dense", "--tokens", "tok.pt", "--output", "out/found", "--all", ALL]
    return subprocess.run([*command, *given, *ASKED.split(), *options], cwd=place, capture_output=True, text=True)


def test_recipes_are_compared_from_one_start(place):
    (place / "weight.yaml").write_text("attention_weights: {importance: 2.0, all: 0.0}\n")
    plain = "{stages: [all], steps: 2}"
    made = run(place, f"plain={plain}", f"again={plain}", "weight=weight.yaml", options=["--keep", "kept"])
    assert made.returncode == 0, made.stderr[-2000:]
    report = json.loads((place / "out" / "found.json").read_text())
    rows = {row["mask"]: row for row in report["rows"]}
    assert list(rows) == ["dense", "sinks + window, w = 64", "calibrated", "plain", "again", "weight"]
    assert rows["plain"]["kld"] == rows["again"]["kld"] != rows["weight"]["kld"]
    trained = report["trained"]
    recipe = trained["weight"]["recipe"]
    assert recipe == json.loads(json.dumps(Recipe.from_dict(recipe, "").to_dict()))
    assert recipe["attention_weights"] == {"importance": 2.0, "all": 0.0}
    assert trained["weight"]["steps"] == {"importance": 10, "all": 10} and trained["plain"]["steps"] == {"all": 2}
    assert "attention_error" in trained["weight"]["log"]["importance"][-1]
    assert "attention_error" not in trained["weight"]["log"]["all"][-1]
    assert 0 <= trained["plain"]["kept"] <= 1 and list(trained["plain"]["kept_by_depth"]) == ["20"]
    assert trained["plain"]["kept"] == pytest.approx(trained["plain"]["kept_by_depth"]["20"])
    assert len(trained["plain"]["heads"]) == 8
    table = (place / "out" / "found.md").read_text()
    assert "| plain | 2 | - |" in table and "| weight | 10 + 10 |" in table
    AutoModelForCausalLM.from_pretrained(place / "kept" / "again")


@pytest.mark.parametrize(
    ("recipes", "sentence"),
    [
        (["{}"], "--recipe must be NAME=YAML"),
        (["a={}", "a={}"], "each with another name, got a={}"),
        (["a={colour: 1}"], "a must only have the names"),
        (["a={}", "b={keep_window_size: 32}"], "must have one length and one keep_window_size"),
    ],
)
def test_what_is_no_comparison_is_refused(monkeypatch, capsys, recipes, sentence):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    import compare_recipes

    given = [part for recipe in recipes for part in ("--recipe", recipe)]
    monkeypatch.setattr(
        sys, "argv", ["compare_recipes.py", "--base", "dense", "--tokens", "t", "--output", "o", *given]
    )
    with pytest.raises((SystemExit, ValueError)) as refused:
        compare_recipes.parse()
    assert sentence in capsys.readouterr().err + str(refused.value)
