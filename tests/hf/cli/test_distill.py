"""`flash-dmattn distill` end to end on a tiny checkpoint: what it writes, resumes and refuses."""

import argparse
import json
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from flash_dmattn_hf import iter_gates, load_importance
from flash_dmattn_hf.cli import build_parser, distill_progress, main
from flash_dmattn_hf.cli.common import read_tokens
from flash_dmattn_hf.cli.distill import UNFINISHED
from flash_dmattn_hf.cli.distill_data import hold_out
from flash_dmattn_hf.cli.distill_options import read_recipe
from flash_dmattn_hf.cli.distill_results import Results
from flash_dmattn_hf.evaluation import agreement
from flash_dmattn_hf.training.recipe import Recipe

from ..cli_models import tokenizer
from ..tiny import tiny_model

WINDOW, LENGTH = 16, 80
SMALL = f"--keep-window-size {WINDOW} --length {LENGTH} --batch-size 2 --stretches 2 --tasks none --quiet".split()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A dense checkpoint and a text of about 100,000 characters."""
    folder = tmp_path_factory.mktemp("distill")
    model = tiny_model("llama", initializer_range=0.3, eos_token_id=None, max_position_embeddings=1024)
    model.save_pretrained(folder / "dense")
    tokenizer().save_pretrained(folder / "dense")
    (folder / "text.txt").write_text(open(argparse.__file__, encoding="utf-8").read())
    return folder


def distill(folder, out, *options, dense="dense"):
    return main(["distill", str(folder / dense), str(out), "--data", str(folder / "text.txt"), *SMALL, *options])


def results_of(out):
    return json.loads((out / "distillation" / "results.json").read_text())


def weights_of(path):
    return load_file(path / "model.safetensors")


def test_both_stages_end_in_an_ordinary_checkpoint_with_its_figures(folder, tmp_path, capsys):
    out = tmp_path / "new" / "out"
    config = folder / "quarter.yaml"
    config.write_text("importance_share: 0.25\ngate_learning_rates: {importance: 0.1}\n")
    assert distill(folder, out, "--steps", "12", "--config", str(config)) == 0
    printed = capsys.readouterr().out
    assert "2 of 2 attention layers converted" in printed and f"wrote {out}" in printed
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    model, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert AutoTokenizer.from_pretrained(out)("abc")["input_ids"] == [15, 16, 17]
    section = model.config.flash_dmattn
    assert (section["local_window_size"], section["num_sink_tokens"]) == (WINDOW // 4, 4)
    assert not section["add_importance_bias"] and section["dt_proj_bias"] and model.config.use_cache
    before, after = weights_of(folder / "dense"), weights_of(out)
    assert not any(torch.equal(after[name], weight) for name, weight in before.items())

    results = results_of(out)
    assert not (out / "importance").exists()  # it would not fit the dense model
    rows = {row["mask"]: row for row in results["rows"]}
    names = ["dense", f"sinks + window, w = {WINDOW}", "calibrated", "importance trained", "all weights trained"]
    assert list(rows) == names and rows["dense"]["kld"] == 0
    assert len({rows[name]["kld"] for name in names}) == 5
    assert (out / "distillation" / "results.txt").read_text() in printed
    log = [json.loads(line) for line in (out / "distillation" / "log.jsonl").read_text().splitlines()]
    measured = [entry["stage"] for entry in log if "held_out/kld" in entry]
    assert measured == ["importance"] * 4 + ["all"] * 5  # three steps cross a quarter of the first stage
    assert results["steps_of_stages"] == {"importance": 3, "all": 9}
    assert results["recipe"]["steps"] == 12 and results["device"] == "cpu"
    assert results["data"] == [str(folder / "text.txt")]
    assert [entry["held_out/kld"] for entry in log if "held_out/kld" in entry][-1] == pytest.approx(
        rows["all weights trained"]["kld"], abs=1e-6
    )


def held_out_agreement(folder, model, reference=None):
    """The agreement of a model with dense on the text that `distill` holds out."""
    text = read_tokens(tokenizer(), folder / "text.txt", 10**6)
    _, held_out = hold_out(torch.cat([text, torch.tensor([tokenizer().eos_token_id])]), LENGTH)
    options = {"context_length": LENGTH, "first_row": WINDOW, "max_stretches": 2}
    return agreement(model, held_out, reference=reference, **options)


def test_the_last_row_is_what_the_written_model_reaches(folder, tmp_path):
    out = tmp_path / "out"
    assert distill(folder, out, "--steps", "4", "--stages", "all") == 0
    dense = AutoModelForCausalLM.from_pretrained(folder / "dense")
    near = held_out_agreement(folder, AutoModelForCausalLM.from_pretrained(out), dense)
    row = results_of(out)["rows"][-1]
    assert row["mask"] == "all weights trained" and row["num_rows"] == near.num_rows
    assert row["kld"] == pytest.approx(near.kld, abs=1e-5) and row["loss"] == pytest.approx(near.loss, abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_importance_alone_leaves_the_backbone_as_it_is(folder, tmp_path, dtype):
    model = AutoModelForCausalLM.from_pretrained(folder / "dense", dtype=dtype)
    model.save_pretrained(folder / str(dtype))
    tokenizer().save_pretrained(folder / str(dtype))
    out = tmp_path / "out"
    options = ["--steps", "3", "--stages", "importance", "--importance-input", "hidden"]
    assert distill(folder, out, *options, dense=str(dtype)) == 0
    before, after = weights_of(folder / str(dtype)), weights_of(out)
    assert before.keys() < after.keys() and {tensor.dtype for tensor in after.values()} == {dtype}
    again = load_importance(AutoModelForCausalLM.from_pretrained(folder / str(dtype), dtype=dtype), out / "importance")
    assert all(torch.equal(tensor, after[name]) for name, tensor in again.state_dict().items() if ".dma." in name)
    assert all(torch.equal(after[name], weight) for name, weight in before.items())
    assert [row["mask"] for row in results_of(out)["rows"]][2:] == ["calibrated", "importance trained"]
    near = held_out_agreement(folder, AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32))
    rows = results_of(out)["rows"]
    assert rows[-1]["kld"] == pytest.approx(near.kld, abs=1e-6) and rows[-1]["top1"] == near.top1
    assert rows[0]["loss"] == pytest.approx(near.reference_loss, abs=1e-6)  # all rows are of the same arithmetic


def test_windows_of_single_layers_are_those_of_the_file(folder, tmp_path):
    config, out = tmp_path / "shares.yaml", tmp_path / "out"
    config.write_text("window_shares: {0: 2.5}\nstages: [importance]\n")
    assert distill(folder, out, "--steps", "3", "--config", str(config)) == 0
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.config.flash_dmattn["window_shares"] == {"0": 2.5}
    assert [gate.windows.keep_window_size for _, _, gate in iter_gates(model)] == [40, WINDOW]
    assert json.loads((out / "importance" / "importance.json").read_text())["settings"] == model.config.flash_dmattn
    results = results_of(out)
    assert results["recipe"]["window_shares"] == {"0": 2.5} and results["rows"][-1]["keep_window_size"] == WINDOW
    log = [json.loads(line) for line in (out / "distillation" / "log.jsonl").read_text().splitlines()]
    last = [entry["held_out/kld"] for entry in log if "held_out/kld" in entry][-1]
    assert last == pytest.approx(results["rows"][-1]["kld"], abs=1e-5)  # both beyond WINDOW tokens


def test_an_unfinished_run_keeps_its_windows_of_single_layers(tmp_path):
    arguments = argparse.Namespace(model="dense", data=["text.txt"], text_column="text", data_split="train")
    arguments.resume, recipe = True, Recipe(window_shares={1: 2})
    Results.open(tmp_path, recipe, arguments)._save()
    Results.open(tmp_path, recipe, arguments)
    with pytest.raises(ValueError, match=r"window_shares must be that of the run in .*, {'1': 2}, got None"):
        Results.open(tmp_path, Recipe(), arguments)


def test_an_adapter_is_merged(folder, tmp_path):
    config = folder / "lora.yaml"
    config.write_text("lora_rank: 4\nlearning_rate: 0.01\nsteps: 1000\nstages: [all]\n")
    out = tmp_path / "out"
    assert distill(folder, out, "--steps", "3", "--config", str(config)) == 0
    before, after = weights_of(folder / "dense"), weights_of(out)
    assert not any("lora" in name for name in after) and not (out / "adapter_config.json").exists()
    for name, weight in before.items():
        assert torch.equal(after[name], weight) != ("_proj" in name), name
    assert results_of(out)["recipe"]["lora_rank"] == 4 and results_of(out)["recipe"]["steps"] == 3
    assert results_of(out)["rows"][-1]["mask"] == "adapter trained"


def test_a_limit_in_minutes_ends_the_run(folder, tmp_path):
    out = tmp_path / "out"
    assert distill(folder, out, "--minutes", "0.01") == 0
    log = [json.loads(line) for line in (out / "distillation" / "log.jsonl").read_text().splitlines()]
    assert {entry["stage"] for entry in log} == {"importance", "all"} and max(entry["step"] for entry in log) < 1000


def test_recall_is_measured(folder, tmp_path, capsys):
    out = tmp_path / "out"
    options = ["--steps", "2", "--length", "200", "--tasks", "pass_key", "--samples", "1", "--stages", "all"]
    assert distill(folder, out, *options) == 0
    assert all(row["recall"][0]["task"] == "pass_key" for row in results_of(out)["rows"])
    assert "recall: share of answer tokens right" in capsys.readouterr().out


@pytest.mark.parametrize("stop", [("importance", 4), ("all", 3)], ids=["first stage", "second stage"])
def test_an_interrupted_run_goes_on_to_the_same_weights(folder, tmp_path, monkeypatch, capsys, stop):
    config = folder / "often.yaml"
    config.write_text("save_steps: 2\nimportance_share: 0.5\n")
    options = ["--steps", "10", "--config", str(config)]
    assert distill(folder, tmp_path / "whole", *options) == 0

    class Interrupted(distill_progress.DistillProgress):
        def on_step_begin(self, args, state, control, **kwargs):
            if (self.stage, state.global_step) == stop:
                raise KeyboardInterrupt

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr("flash_dmattn_hf.cli.distill.DistillProgress", Interrupted)
        assert distill(folder, out, *options) == 130
    assert not out.exists() and out.with_name("out" + UNFINISHED).is_dir()
    assert distill(folder, out, *options) == 2
    assert "holds a run that was interrupted: pass --resume" in capsys.readouterr().err
    assert distill(folder, out, *options, "--resume", "--seed", "1") == 2
    assert "seed must be that of the run in" in capsys.readouterr().err
    assert distill(folder, out, *options, "--resume", "--text-column", "body") == 2
    assert "text_column must be that of the run in" in capsys.readouterr().err
    text = (folder / "text.txt").read_text()
    (folder / "text.txt").write_text(text.replace("argparse", "argument", 1))
    assert distill(folder, out, *options, "--resume") == 2
    assert "the text of --data must be that of the run in" in capsys.readouterr().err
    (folder / "text.txt").write_text(text)
    (out.with_name("out" + UNFINISHED) / stop[0] / "checkpoint-9").mkdir()  # another one, which was never finished
    assert distill(folder, out, *options, "--resume") == 0
    whole, resumed = weights_of(tmp_path / "whole"), weights_of(out)
    assert all(torch.equal(resumed[name], weight) for name, weight in whole.items())
    assert [row["kld"] for row in results_of(out)["rows"]] == [
        row["kld"] for row in results_of(tmp_path / "whole")["rows"]
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


BAD = {
    "short text": (["--length", "6000"], "--data must hold at least 20 stretches of --length 6000"),
    "length": (["--length", "17"], "length must be"),
    "stages": (["--stages", "gates"], "stages must be one or both of"),
    "learning rate": (["--learning-rate", "-1"], "learning_rate must be a number above 0"),
    "two limits": (["--minutes", "1"], "argument --minutes: not allowed with argument --steps"),
    "tasks": (["--tasks", "poetry"], "--tasks must be among"),
    "local window": (["--local-window-size", "14"], "num_sink_tokens + local_window_size must not exceed"),
    "no config": (["--config", "nothing.yaml"], "must be a file, got nothing.yaml"),
    "device": (["--device", "meta"], "--device must be cpu or cuda, got meta"),
}


@pytest.mark.parametrize(("options", "sentence"), BAD.values(), ids=BAD.keys())
def test_bad_input_ends_with_one_sentence(folder, tmp_path, capsys, options, sentence):
    try:
        code = distill(folder, tmp_path / "out", "--steps", "2", *options)
    except SystemExit as exit:  # argparse
        code = exit.code
    captured = capsys.readouterr()
    last = captured.err.strip().splitlines()[-1]
    assert code == 2 and last.startswith("flash-dmattn distill: error: ") and sentence in last
    assert "Traceback" not in captured.err and captured.out == "" and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("colour: 1", "must only have the names"),
        ("- 1", "must hold a mapping, got list"),
        ("a: [", "must be YAML"),
        ("selection_band: 0.5", "selection_band must be None or at least 1, got 0.5"),
        ("temperatures: {all: [0.0, 0.1]}", "temperatures must be a first and a last one above 0"),
    ],
)
def test_a_bad_config_ends_with_one_sentence(folder, tmp_path, capsys, content, sentence):
    config = tmp_path / "config.yaml"
    config.write_text(content)
    assert distill(folder, tmp_path / "out", "--config", str(config)) == 2
    assert sentence in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


def test_what_a_later_stage_would_refuse_is_refused_before_the_first(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "peft", None)
    assert distill(folder, tmp_path / "out", "--steps", "2", "--lora") == 2
    assert "an adapter needs the package peft: pip install peft" in capsys.readouterr().err
    assert distill(folder, tmp_path / "out", "--steps", "2", "--seed", "-1") == 2
    assert "seed must be an integer from 0 to" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_model_itself_is_not_replaced(folder, capsys):
    before = weights_of(folder / "dense")
    assert distill(folder, folder / "dense", "--steps", "2", "--overwrite") == 2
    assert "OUT must differ from MODEL" in capsys.readouterr().err
    assert all(torch.equal(weight, before[name]) for name, weight in weights_of(folder / "dense").items())


def test_a_file_may_leave_recall_out(tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text("tasks: none\nkeep_window_size: 16\nlength: 80\n")
    arguments = build_parser().parse_args(["distill", "dense", "out", "--data", "text.txt", "--config", str(config)])
    assert read_recipe(arguments).tasks == ()


def test_a_converted_model_is_refused(folder, tmp_path, capsys):
    assert main(["convert", str(folder / "dense"), str(tmp_path / "converted"), "--keep-window-size", "16"]) == 0
    assert distill(folder, tmp_path / "out", "--steps", "2", dense=tmp_path / "converted") == 2
    assert "already has dynamic masks" in capsys.readouterr().err
    assert not (tmp_path / "out").exists() and not (tmp_path / ("out" + UNFINISHED)).exists()
