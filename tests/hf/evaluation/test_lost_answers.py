"""scripts/lost_answers.py: what dense attention reads, and what a cache still holds, found by hand."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from flash_dmattn_hf import DynamicMaskConfig, convert_model
from flash_dmattn_hf.conversion.checkpoint import find_source, load_model, load_tokenizer
from flash_dmattn_hf.evaluation import recall_prompts

from ..cli_models import save_dense

SCRIPTS = Path(__file__).resolve().parents[3] / "scripts"
LENGTH = 320


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    place = tmp_path_factory.mktemp("answers")
    save_dense(place / "dense")
    source = find_source(str(place / "dense"))
    for name, size in (("window", 64), ("everything", LENGTH)):
        mask = DynamicMaskConfig(keep_window_size=size, num_sink_tokens=2, local_window_size=size - 2)
        convert_model(load_model(source, dtype=torch.float32), mask).save_pretrained(place / name)
    text = torch.randint(5, 60, (4000,), generator=torch.Generator().manual_seed(0))
    torch.save({"test": text}, place / "tok.pt")
    reports = {}
    for name in ("window", "everything"):
        files = f"--base dense --model {name} --tokens tok.pt --json {name}.json"
        options = f"{files} --context-length {LENGTH} --depths 0 --samples 2 --device cpu".split()
        run = subprocess.run(
            [sys.executable, SCRIPTS / "lost_answers.py", *options], cwd=place, capture_output=True, text=True
        )
        assert run.returncode == 0, run.stderr[-2000:]
        reports[name] = json.loads((place / f"{name}.json").read_text()), run.stdout
    model, tokenizer = load_model(source, dtype=torch.float32).eval(), load_tokenizer(source)
    prompts = recall_prompts(tokenizer, text, tasks=["pass_key"], contexts=[LENGTH], depths=[0], samples=2)
    return reports, model, prompts


def test_what_dense_reads_is_its_attention(found):
    (report, _), model, prompts = found[0]["window"], *found[1:]
    model.set_attn_implementation("eager")
    expected = torch.zeros(model.config.num_hidden_layers, model.config.num_attention_heads)
    for prompt in prompts:
        with torch.no_grad():
            attentions = model(prompt.input_ids[None], output_attentions=True).attentions
        (start, end), ids = prompt.spans[0], prompt.input_ids.tolist()
        for layer, weights in enumerate(attentions):
            for index in range(end - start):
                for at in range(prompt.question_start):
                    if ids[at : at + end - start] == ids[start:end]:
                        expected[layer] += weights[0, :, start - 1 + index, at + index] / (end - start) / len(prompts)
    for row in report["rows"]:
        assert row["read"] == pytest.approx(expected[row["layer"], row["head"]].item(), abs=1e-5)
    assert len(report["rows"]) == expected.numel() and expected.sum() > 0


def test_a_window_has_lost_what_is_outside(found):
    report, printed = found[0]["window"]
    assert all(row["held"] == 0 for row in report["rows"]) and report["kept"] == 0
    assert "0% is paid to tokens that the head still holds" in printed
    assert {prompt["depth"] for prompt in report["prompts"]} == {0}


def test_a_cache_of_everything_has_lost_nothing(found):
    report, printed = found[0]["everything"]
    assert all(row["held"] == 1 for row in report["rows"]) and report["kept"] == pytest.approx(1)
    assert "100% is paid to tokens that the head still holds" in printed
    assert all(prompt["dense"] == prompt["converted"] for prompt in report["prompts"])
