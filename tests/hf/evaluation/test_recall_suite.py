"""`flash-dmattn eval --suite recall`: every figure is that of its row, and bad input ends with one sentence."""

import json
import shutil
import sys

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from flash_dmattn_hf import DynamicMaskConfig, convert_model, iter_gates
from flash_dmattn_hf.cli import main
from flash_dmattn_hf.conversion.variants import with_window, without_importance
from flash_dmattn_hf.evaluation import agreement, pictures, recall, recall_prompts, recall_suite
from flash_dmattn_hf.evaluation.memory import cache_bytes

from ..tiny import tiny_model, tokens
from .recall_text import CHARACTERS, TEXT, TOKENS, characters

SINKS, WINDOW = 2, 32
SMALL = ["--contexts", "160,200", "--depths", "0,60", "--samples", "2", "--stretches", "2", "--tasks", "pass_key"]
READ = 2 * 200
"""Tokens that the command then reads: stretches times the longest context."""


def tiny(**options):
    return tiny_model("llama", initializer_range=0.3, eos_token_id=None, max_position_embeddings=1024, **options)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A text, a dense model, one converted from it whose keys differ in importance, and another dense model."""
    folder = tmp_path_factory.mktemp("recall")
    (folder / "text.txt").write_text(TEXT)
    tiny().save_pretrained(folder / "dense")
    tiny(seed=1).save_pretrained(folder / "other")
    model = convert_model(tiny(), DynamicMaskConfig(WINDOW, SINKS, 8))
    for _, _, gate in iter_gates(model):
        nn.init.normal_(gate.A, std=2.0, generator=torch.Generator().manual_seed(1))
    model.save_pretrained(folder / "converted")
    for name in ("dense", "converted", "other"):
        characters().save_pretrained(folder / name)
    return folder


def evaluate(folder, *options, model="converted"):
    """Exit code and JSON of one run."""
    file = folder / "numbers.json"
    arguments = [folder / model, "--suite", "recall", "--text", folder / "text.txt", "--json", file, *options]
    assert main(["eval", *map(str, arguments)]) == 0
    return json.loads(file.read_text())


def test_rows_are_what_the_parts_measure(folder, capsys):
    picture = folder / "windows.svg"
    numbers = evaluate(folder, *SMALL, "--windows", "32,64", "--picture", picture)
    printed = capsys.readouterr().out
    rows = {row["mask"]: row for row in numbers["rows"]}
    assert list(rows) == [
        "dense",
        *(f"{kind}, w = {window}" for window in (32, 64) for kind in ("sinks + window", "importance")),
    ]
    cases = {"tasks": ["pass_key"], "contexts": [160, 200], "depths": [0, 60], "samples": 2}
    prompts = recall_prompts(CHARACTERS, TOKENS[:READ], **cases)
    settings = {"context_length": 200, "first_row": 64, "max_stretches": 2}
    plain = AutoModelForCausalLM.from_pretrained(folder / "dense", attn_implementation="sdpa")
    check(rows["dense"], plain, prompts, settings, reference=plain)
    model = AutoModelForCausalLM.from_pretrained(folder / "converted")
    check(rows["importance, w = 32"], model, prompts, settings, reference=plain)
    with with_window(model, 64), without_importance(model):
        check(rows["sinks + window, w = 64"], model, prompts, settings, reference=plain)
    for row in rows.values():
        assert f"{row['perplexity']:12.3f}{row['kld']:10.4f}" in printed
    assert "pass_key" in printed and "N = 200" in printed and "8 prompts of recall per mask" in printed
    drawn = picture.read_text()
    assert all(f"<!-- {text} -->" in drawn for text in [*rows, "pass_key", "160", "200", "depth (%)"])
    assert "quality against memory" in drawn


def check(row, model, prompts, settings, reference):
    near = agreement(model, TOKENS[:READ], **settings, reference=reference)
    assert row["kld"] == pytest.approx(near.kld, abs=1e-5) and row["loss"] == pytest.approx(near.loss, abs=1e-5)
    assert row["num_rows"] == 2 * (199 - 64)
    assert row["recall"] == [cell._asdict() for cell in recall(model, prompts)]
    assert row["cache_bytes"] == cache_bytes(model, TOKENS[:200])


def test_caches_are_measured_in_the_dtype_of_the_weights(folder):
    """Also under autocast, where a dense cache holds float32 and ours bfloat16."""
    for name in ("dense", "converted"):
        model = AutoModelForCausalLM.from_pretrained(folder / name)
        expected = cache_bytes(model, TOKENS[:200])
        with torch.autocast("cpu", torch.bfloat16):
            assert cache_bytes(model, TOKENS[:200]) == expected


def test_the_memory_of_a_row_is_that_of_the_windows_of_its_layers(folder):
    """Layers of 24 and 64 keys take as much as half of two of 24 and half of two of 64."""
    model = AutoModelForCausalLM.from_pretrained(folder / "converted", flash_dmattn={"window_shares": {0: 0.75, 1: 2}})
    rows = recall_suite(model, TOKENS[:READ], [], windows=[32], context_length=200, max_stretches=1)
    plain = AutoModelForCausalLM.from_pretrained(folder / "converted")
    expected = 0
    for window in (24, 64):
        with with_window(plain, window):
            expected += cache_bytes(plain, TOKENS[:200]) // 2
    assert [row["cache_bytes"] for row in rows[1:]] == [expected] * 2 and rows[2]["keep_window_size"] == 32


def test_the_windows_of_the_command_are_those_of_the_settings(folder):
    """Not that of the first layer."""
    shutil.copytree(folder / "converted", folder / "shares")
    config = json.loads((folder / "shares" / "config.json").read_text())
    config["flash_dmattn"]["window_shares"] = {"0": 2}
    (folder / "shares" / "config.json").write_text(json.dumps(config))
    assert evaluate(folder, *SMALL, model="shares")["windows"] == [WINDOW]
    file = folder / "perplexity.json"
    text = ["--text", str(folder / "text.txt"), "--json", str(file), "--contexts", "160", "--stretches", "1"]
    assert main(["eval", str(folder / "shares"), *text]) == 0
    assert json.loads(file.read_text())["rows"][2]["mask"] == f"importance, w = {WINDOW}"


def test_the_dense_row_is_the_measure_of_the_others(folder):
    numbers = evaluate(folder, *SMALL, "--windows", "32,64")
    rows = {row["mask"]: row for row in numbers["rows"]}
    dense = rows["dense"]
    assert (dense["kld"], dense["top1"], dense["share_of_gap"]) == (0.0, 1.0, None)
    assert dense["cache_bytes"] == 2 * 2 * 2 * 8 * 200 * 4  # layers, keys and values, kv heads, head dim, tokens, bytes
    assert rows["importance, w = 32"]["kld"] > 1e-3
    assert rows["importance, w = 32"]["cache_bytes"] == rows["sinks + window, w = 32"]["cache_bytes"]
    for window in (32, 64):
        plain, ours = rows[f"sinks + window, w = {window}"], rows[f"importance, w = {window}"]
        if plain["loss"] > dense["loss"]:
            share = (plain["loss"] - ours["loss"]) / (plain["loss"] - dense["loss"])
            assert ours["share_of_gap"] == pytest.approx(share) and plain["share_of_gap"] == 0
        else:
            assert ours["share_of_gap"] is plain["share_of_gap"] is None


def test_the_file_says_where_the_figures_come_from(folder):
    numbers = evaluate(folder, *SMALL, "--seed", "7")
    assert numbers["seed"] == 7 and numbers["device"] == "cpu" and numbers["dtype"] == "float32"
    assert numbers["command"].startswith("flash-dmattn eval ") and numbers["command"].split()[-2:] == ["--seed", "7"]
    assert numbers["versions"]["torch"] == torch.__version__
    assert numbers["contexts"] == [160, 200] and numbers["windows"] == [WINDOW] and numbers["depths"] == [0, 60]
    assert numbers["scoring"] == "teacher-forced"
    assert evaluate(folder, *SMALL, "--seed", "7")["rows"] == numbers["rows"]


def test_all_tasks_and_the_picture(folder):
    options = ["--contexts", "640", "--depths", "50", "--samples", "1", "--stretches", "1"]
    picture = folder / "picture.png"
    numbers = evaluate(folder, *options, "--picture", picture)
    assert [cell["task"] for cell in numbers["rows"][0]["recall"]] == numbers["tasks"]
    assert len(numbers["tasks"]) == 5
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_picture_without_depths(folder):
    picture = folder / "words.svg"
    options = ["--contexts", "640", "--depths", "50", "--samples", "1", "--stretches", "1", "--tasks", "common_words"]
    evaluate(folder, *options, "--picture", picture)
    assert "common_words" not in picture.read_text() and "<svg" in picture.read_text()


def test_the_teacher_gives_dense_and_sinks_and_window(folder):
    alone = evaluate(folder, *SMALL)["rows"]
    taught = evaluate(folder, *SMALL, "--teacher", folder / "dense")["rows"]
    for one, other in zip(alone, taught, strict=True):  # the weights are the same
        assert other["loss"] == pytest.approx(one["loss"], abs=1e-5)
        assert other["kld"] == pytest.approx(one["kld"], abs=1e-5)
    dense, plain, ours = evaluate(folder, *SMALL, "--teacher", folder / "other")["rows"]
    assert dense["kld"] == 0 and dense["loss"] != pytest.approx(alone[0]["loss"])
    assert plain["loss"] != pytest.approx(alone[1]["loss"])
    assert ours["loss"] == pytest.approx(alone[2]["loss"], abs=1e-5)
    model, other = (AutoModelForCausalLM.from_pretrained(folder / name) for name in ("converted", "other"))
    near = agreement(model, TOKENS[:READ], context_length=200, first_row=WINDOW, reference=other, max_stretches=2)
    assert ours["kld"] == pytest.approx(near.kld, abs=1e-5)


def test_generated_answers(folder, capsys):
    numbers = evaluate(folder, *SMALL, "--contexts", "160", "--samples", "1", "--generate")
    cells = [cell for row in numbers["rows"] for cell in row["recall"]]
    assert numbers["scoring"] == "generated" and len(cells) == 6
    assert all(cell["tokens"] is None and 0 <= cell["answers"] <= 1 for cell in cells)
    assert "share of answers right" in capsys.readouterr().out


def test_a_dense_model_is_converted(folder):
    numbers = evaluate(folder, *SMALL, "--windows", "32", model="dense")
    _, plain, ours = numbers["rows"]
    assert ours["loss"] == plain["loss"] and ours["recall"] == plain["recall"]


def test_nothing_of_the_model_is_changed():
    model = convert_model(tiny(), DynamicMaskConfig(WINDOW, SINKS, 8))
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    config, attention = model.config.to_dict(), model.config._attn_implementation
    prompts = recall_prompts(CHARACTERS, TOKENS, tasks=["pass_key"], contexts=[160], depths=[0], samples=1)
    recall_suite(model.train(), TOKENS, prompts, windows=[16], context_length=160, max_stretches=1)
    assert model.training
    assert (model.config.to_dict(), model.config._attn_implementation) == (config, attention)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


def test_a_model_without_gates_is_refused():
    with pytest.raises(ValueError, match="model must be converted, got a LlamaForCausalLM without"):
        recall_suite(tiny(), tokens(1, 50), [], windows=[8], context_length=50)


def refused(capsys, folder, *options, suite=("--suite", "recall")):
    """The one sentence on stderr with which the command ends."""
    capsys.readouterr()
    arguments = ["eval", folder / "converted", "--text", folder / "text.txt", *suite, *options]
    try:
        code = main([str(argument) for argument in arguments])
    except SystemExit as exit:  # argparse
        code = exit.code
    captured = capsys.readouterr()
    assert code == 2 and captured.out == "" and "Traceback" not in captured.err
    return captured.err.strip().splitlines()[-1]


@pytest.mark.parametrize(
    "options, message",
    [
        (["--tasks", "pass_key,keys"], "tasks must be among"),
        (["--depths", "0,101"], "must be from 0 to 100, got 101"),
        (["--depths", "a"], "must be integers separated by commas, got 'a'"),
        (["--samples", "0"], "must be at least 1, got 0"),
        (["--contexts", "100"], "a context must have at least"),
        (["--contexts", "100000000"], "--text must hold at least 100000000 tokens"),
        ([*SMALL, "--windows", "199"], "the longest context must be at least 201 tokens, for rows beyond"),
        (["--picture", "/nowhere/at/all.png"], "--picture must be in an existing directory, got /nowhere/at/all.png"),
        (["--picture", "picture.doc"], "a picture must end in one of"),
        (["--json", "/nowhere/at/all.json"], "--json must be in an existing directory"),
        (["--json", "/"], "--json must be a file, got the directory /"),
        (["--teacher", "/nowhere/model"], "MODEL must exist, got /nowhere/model"),
        (["--suite", "memory"], "invalid choice: 'memory'"),
    ],
    ids=lambda value: " ".join(value[-2:]) if isinstance(value, list) else "",
)
def test_what_is_wrong_is_named(options, message, folder, capsys):
    assert message in refused(capsys, folder, *options)


def test_options_of_the_suite_need_it(folder, capsys):
    values = {"--depths": ["10"], "--generate": [], "--seed": ["0"], "--samples": ["1"], "--picture": ["a.png"]}
    for option in ([name, *value] for name, value in (values | {"--tasks": ["keys"], "--teacher": ["a"]}).items()):
        assert f"{option[0]} needs --suite recall" in refused(capsys, folder, *option, suite=())


def test_a_teacher_of_another_vocabulary_is_refused(folder, tmp_path, capsys):
    shutil.copytree(folder / "dense", tmp_path / "teacher")
    other = characters()
    other.add_tokens(["a word"])
    other.save_pretrained(tmp_path / "teacher")
    sentence = refused(capsys, folder, "--teacher", tmp_path / "teacher")
    assert "--teacher must have the vocabulary of MODEL" in sentence


def test_a_picture_needs_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.backend_bases", None)
    with pytest.raises(ImportError, match="a picture needs the package matplotlib: pip install matplotlib"):
        pictures.check_format(tmp_path / "a.png")
