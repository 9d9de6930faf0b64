"""A long measurement that is cut off, or one of whose rows fails, leaves the rows that it has."""

import json
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from hf.tiny import tiny_model

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"
SHARES = {"tokens": 1.0, "answers": 1.0, "all_right": 1.0}
CELL = {"task": "pass_key", "context": 64, "depth": 50, "num_prompts": 1, **SHARES}


@pytest.fixture(autouse=True)
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))


class CutOff(Exception):
    pass


def test_a_study_from_scratch_has_the_variants_that_were_trained(monkeypatch, tmp_path):
    import from_scratch

    trained = []

    def train(model, variant, *_):
        trained.append(variant.name)
        if len(trained) == 3:
            raise CutOff
        return [2.0, 1.0], 0.5

    figures = {"copy_accuracy": 0.5, "copy_loss": 1.0, "foreign_accuracy": 0.1, "foreign_loss": 2.0}
    monkeypatch.setattr(from_scratch, "train", train)
    monkeypatch.setattr(from_scratch, "draw", lambda report, path: None)
    monkeypatch.setattr(from_scratch, "measure", lambda *_: {"loss_beyond_window": 3.0, **figures})
    torch.save({"train": torch.arange(2048) % 600, "test": torch.arange(2048) % 600}, tmp_path / "tok.pt")
    files = ["--tokens", str(tmp_path / "tok.pt"), "--output", str(tmp_path / "study")]
    monkeypatch.setattr(sys, "argv", ["from_scratch.py", *files, "--quick", "--steps", "2", "--device", "cpu"])
    with pytest.raises(CutOff):
        from_scratch.main()
    rows = json.loads((tmp_path / "study.json").read_text())["results"]
    assert [row["variant"] for row in rows] == trained[:2] == ["dense", "sliding window"]
    assert [row["share_of_gap"] for row in rows] == [None, None]  # sinks + window are not there
    assert (tmp_path / "study.md").read_text().count("\n| ") == 4


def test_every_variant_has_its_mask():
    from from_scratch import VARIANTS

    masks = {variant.name: variant.mask(256) for variant in VARIANTS if variant.num_sinks is not None}
    sizes = {name: (mask.num_sink_tokens, mask.local_window_size) for name, mask in masks.items()}
    assert list(sizes.values()) == [(0, 256), (4, 252), (4, 64), (4, 64), (4, 192), (4, 192)]
    assert [name for name, mask in masks.items() if mask.importance_input == "hidden"] == [VARIANTS[-1].name]
    assert [variant.is_soft for variant in VARIANTS] == ["soft" in variant.name for variant in VARIANTS]


def test_shares_of_the_gap_come_with_both_of_its_ends():
    from from_scratch import add_shares

    rows = [{"variant": name, "loss_beyond_window": loss} for name, loss in (("dense", 1.0), ("dynamic masks", 1.5))]
    add_shares(rows)
    assert [row["share_of_gap"] for row in rows] == [None, None]
    add_shares([*rows, {"variant": "sinks + window", "loss_beyond_window": 3.0}])
    assert [row["share_of_gap"] for row in rows] == [1.0, 0.75]


def test_a_table_has_the_rows_that_were_measured(monkeypatch, tmp_path):
    import quality_table
    from flash_dmattn_hf.evaluation.rows import Row

    names = ["dense", "sinks + window", "calibrated"]
    monkeypatch.setattr(quality_table, "find_source", lambda name: name)
    monkeypatch.setattr(quality_table, "load_tokenizer", lambda source: None)
    monkeypatch.setattr(quality_table, "leading_tokens", lambda tokenizer: [])
    monkeypatch.setattr(quality_table, "recall_prompts", lambda *_, **options: [])
    monkeypatch.setattr(quality_table, "load", lambda name, device: None)
    monkeypatch.setattr(quality_table, "convert_model", lambda *_, **options: None)
    monkeypatch.setattr(quality_table, "rows", lambda *_: (Row(name, name, 16, None, None) for name in names))

    def measure(row, *_, **options):
        if row.label == names[2]:
            raise CutOff
        found = {"mask": row.label, "kind": row.kind, "keep_window_size": 16 if row.kind != "dense" else None}
        found |= {"cache_bytes": 100, "loss": 1.0 + len(row.label), "perplexity": 3.0, "kld": 0.1, "top1": 0.9}
        return {**found, "recall": [CELL]}

    monkeypatch.setattr(quality_table, "measure_row", measure)
    torch.save({"train": torch.arange(600), "test": torch.arange(1024)}, tmp_path / "tok.pt")
    files = ["--tokens", str(tmp_path / "tok.pt"), "--output", str(tmp_path / "table"), "--base", "model"]
    options = ["--settings", "64/16", "--no-peers", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["quality_table.py", *files, *options])
    with pytest.raises(CutOff):
        quality_table.main()
    (table,) = json.loads((tmp_path / "table.json").read_text())["tables"]
    assert [row["mask"] for row in table["rows"]] == names[:2]
    assert table["rows"][1]["share_of_gap"] == 0.0
    assert names[1] in (tmp_path / "table.md").read_text()


def test_a_table_that_could_not_be_finished_is_refused_before_its_first_row(tmp_path):
    from quality_table import Setting, check

    tiny_model("llama").save_pretrained(tmp_path / "dense")
    options = Namespace(settings=[Setting(64, 16)], stretches=2, model=[], control=None)
    check(options, torch.arange(128))
    with pytest.raises(ValueError, match="test of --tokens must hold at least 128 tokens, got 127"):
        check(options, torch.arange(127))
    options.model = [f"label={tmp_path / 'dense'}"]
    with pytest.raises(ValueError, match="a trained model must be converted, got .*dense without flash_dmattn"):
        check(options, torch.arange(128))
    options.model, options.control = [], str(tmp_path / "nothing")
    with pytest.raises(ValueError, match="MODEL must exist, got .*nothing"):
        check(options, torch.arange(128))


def test_the_window_of_the_training_is_in_the_label_of_every_trained_model(monkeypatch):
    import quality_table
    from flash_dmattn_hf import DynamicMaskConfig, convert_model

    model = convert_model(tiny_model("llama"), DynamicMaskConfig(keep_window_size=16))
    monkeypatch.setattr(quality_table, "load", lambda *_: model)
    options = Namespace(control="control", model=["label=folder"], device="cpu")
    found = {w: list(quality_table.rows(model, quality_table.Setting(64, w), options)) for w in (8, 16)}
    assert [row.label for row in found[16]][2::2] == ["sinks + window, trained", "label"]
    at_16 = " (trained at w = 16)"
    assert [row.label for row in found[8]][2::2] == ["sinks + window, trained" + at_16, "label" + at_16]


def test_a_dense_attention_that_does_not_serve_a_shape_leaves_the_others_their_rows(monkeypatch):
    import benchmark_attention

    def measure(arguments, engine, *_):
        if engine == "cudnn":
            raise RuntimeError("No available kernel.\nAborting execution.")
        return [{"engine": engine, "work": "forward", "milliseconds": 1.0, "useful_tflops": 1.0, "peak_mib": None}]

    monkeypatch.setattr(benchmark_attention, "measure", measure)
    monkeypatch.setattr(benchmark_attention, "make_inputs", lambda *_: [])
    options = Namespace(dense_limit=128, flash_limit=128, importance=["iid"], engines=["triton", "cudnn", "flash"])
    rows = benchmark_attention.measure_length(options, 64)
    assert [(row["engine"], row.get("failed")) for row in rows] == [
        ("triton", None), ("cudnn", "No available kernel."), ("flash", None)
    ]  # fmt: skip
    options.engines = ["triton"]
    monkeypatch.setattr(benchmark_attention, "measure", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        benchmark_attention.measure_length(options, 64)
