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


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    place = tmp_path_factory.mktemp("answers")
    save_dense(place / "dense")
    source = find_source(str(place / "dense"))
    window = DynamicMaskConfig(keep_window_size=64, num_sink_tokens=2, local_window_size=62)
    convert_model(load_model(source, dtype=torch.float32), window).save_pretrained(place / "window")
    text = torch.randint(5, 60, (4000,), generator=torch.Generator().manual_seed(0))
    torch.save({"test": text}, place / "tok.pt")
    command = [
        sys.executable,
        SCRIPTS / "lost_answers.py",
        "--base",
        "dense",
        "--model",
        "window",
        "--tokens",
        "tok.pt",
    ]
    options = [
        "--context-length",
        "320",
        "--depths",
        "0",
        "--samples",
        "2",
        "--json",
        "answers.json",
        "--device",
        "cpu",
    ]
    run = subprocess.run([*command, *options], cwd=place, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    model, tokenizer = load_model(source, dtype=torch.float32).eval(), load_tokenizer(source)
    prompts = recall_prompts(tokenizer, text, tasks=["pass_key"], contexts=[320], depths=[0], samples=2)
    return json.loads((place / "answers.json").read_text()), run.stdout, model, prompts


def test_what_dense_reads_is_its_attention(found):
    report, _, model, prompts = found
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
    report, printed, _, _ = found
    assert all(row["held"] == 0 for row in report["rows"]) and report["kept"] == 0
    assert "0% is paid to tokens that the head still holds" in printed
    assert {prompt["depth"] for prompt in report["prompts"]} == {0}
