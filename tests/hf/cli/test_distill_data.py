"""Text for a distillation comes from files, directories and data sets, and a part of it is held out."""

import json
import sys
from types import ModuleType

import pytest
import torch

from flash_dmattn_hf.cli import common
from flash_dmattn_hf.cli.distill_data import HELD_OUT, hold_out, read_data

from ..cli_models import tokenizer

CHARACTERS = tokenizer()
END = CHARACTERS.eos_token_id


def ids(text):
    return CHARACTERS(text, add_special_tokens=False)["input_ids"]


def read(*items, max_tokens=1000, column="text", split="train"):
    return read_data(
        CHARACTERS, list(map(str, items)), max_tokens=max_tokens, column=column, split=split, progress=False
    ).tolist()


@pytest.mark.parametrize("max_tokens", [7, 240, 241, 10_000])
def test_pieces_that_are_tokenized_together_make_the_same_text(tmp_path, monkeypatch, max_tokens):
    monkeypatch.setattr(common, "CHUNK", 3)
    texts = ["".join(f"{i} lines of {name}\n" for i in range(20)) for name in "abc"] + ["", "end"]
    paths = [tmp_path / str(i) for i in range(len(texts))]
    for path, text in zip(paths, texts, strict=True):
        path.write_text(text)
    found = [tokens.tolist() for tokens in common.read_documents(CHARACTERS, paths, max_tokens)]
    cut = next((i for i, text in enumerate(texts) if len(ids(text)) >= max_tokens), len(texts))
    assert found == [ids(text)[:max_tokens] for text in texts[: cut + 1]]
    assert common.read_tokens(CHARACTERS, paths[3], max_tokens).tolist() == []


def test_files_and_directories_are_read_in_order(tmp_path):
    (tmp_path / "one.py").write_text("abc")
    folder = tmp_path / "folder" / "deeper"
    folder.mkdir(parents=True)
    (folder / "b.txt").write_text("second")
    (tmp_path / "folder" / "c.txt").write_text("third")
    (folder / "ignored.md").write_text("no")
    (folder / "empty.txt").write_text("")
    expected = ids("abc") + [END] + ids("third") + [END] + ids("second") + [END]
    assert sorted(read(tmp_path / "one.py", tmp_path / "folder")) == sorted(expected)
    assert read(tmp_path / "one.py", tmp_path / "folder")[:4] == ids("abc") + [END]
    assert read(tmp_path / "folder", max_tokens=3) == read(tmp_path / "folder")[:3]


def stub_datasets(monkeypatch, rows, columns=("text", "other")):
    """The package datasets, as far as it is called; notes how."""
    calls = []

    class Rows(list):
        column_names = list(columns)

    module = ModuleType("datasets")

    def load_dataset(*args, **kwargs):
        calls.append(("load_dataset", args, kwargs))
        return Rows(rows)

    def load_from_disk(path):
        calls.append(("load_from_disk", path))
        return {"train": Rows(rows), "test": Rows(rows[:1])}

    module.load_dataset, module.load_from_disk = load_dataset, load_from_disk
    monkeypatch.setitem(sys.modules, "datasets", module)
    return calls


ROWS = [{"text": "first", "other": "x"}, {"text": None, "other": "y"}, {"text": "third", "other": "z"}]


@pytest.mark.parametrize(("suffix", "loader"), [("jsonl", "json"), ("parquet", "parquet"), ("csv", "csv")])
def test_a_file_of_a_data_set(tmp_path, monkeypatch, suffix, loader):
    calls = stub_datasets(monkeypatch, ROWS)
    file = tmp_path / f"data.{suffix}"
    file.write_text("")
    assert read(file) == ids("first") + [END] + ids("third") + [END]
    assert calls == [("load_dataset", (loader,), {"data_files": str(file), "split": "train", "streaming": True})]


def test_a_data_set_of_the_hub(monkeypatch):
    calls = stub_datasets(monkeypatch, ROWS)
    assert read("owner/name", column="other", split="test") == ids("x") + [END] + ids("y") + [END] + ids("z") + [END]
    assert calls == [("load_dataset", ("owner/name",), {"split": "test", "streaming": True})]


def test_a_saved_data_set(tmp_path, monkeypatch):
    calls = stub_datasets(monkeypatch, ROWS)
    (tmp_path / "dataset_dict.json").write_text("{}")
    assert read(tmp_path, split="test") == ids("first") + [END]
    assert calls == [("load_from_disk", str(tmp_path))]


def test_the_package_datasets_reads_a_file(tmp_path):
    pytest.importorskip("datasets", reason="datasets is an optional dependency")
    file = tmp_path / "data.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    assert read(file) == ids("first") + [END] + ids("third") + [END]


@pytest.mark.parametrize("end", ["", "\n", "\nand more\n"])
def test_a_line_without_end_is_read_and_tokenized_in_pieces(tmp_path, monkeypatch, end):
    monkeypatch.setattr(common, "CHUNK", 16)
    text = "word " * 1000 + end
    (tmp_path / "line.txt").write_text(text)
    *pieces, last = common._pieces([tmp_path / "line.txt"])
    assert last is None and "".join(pieces) == text
    assert max(map(len, pieces)) <= 64
    assert {word for piece in pieces for word in piece.split()} <= {"word", "and", "more"}
    assert read(tmp_path / "line.txt") == [*ids(text), END][:1000]


def test_text_beside_a_saved_data_set_is_no_corpus(tmp_path, monkeypatch):
    stub_datasets(monkeypatch, ROWS)
    (tmp_path / "license.txt").write_text("all rights")
    (tmp_path / "dataset_dict.json").write_text("{}")
    assert read(tmp_path, split="test") == ids("first") + [END]
    with pytest.raises(ValueError, match=r"--data-split must be one of \['train', 'test'\] in .*, got nothing"):
        read(tmp_path, split="nothing")


def test_a_folder_named_like_a_text_is_none(tmp_path):
    (tmp_path / "folder.txt").mkdir()
    (tmp_path / "folder.txt" / "a.txt").write_text("abc")
    assert read(tmp_path) == ids("abc") + [END]


@pytest.mark.parametrize("value", [5, ["two", "words"]])
def test_a_column_without_text_is_refused(monkeypatch, value):
    stub_datasets(monkeypatch, [{"text": "first"}, {"text": value}], columns=["text"])
    found = type(value).__name__
    with pytest.raises(ValueError, match=f"--text-column must be a column of text, but text of a/b holds {found}"):
        read("a/b")


def test_a_data_set_that_breaks_off_is_refused_by_name(monkeypatch):
    class Broken(Exception):
        pass

    class Rows(list):
        column_names = ["text"]

        def __iter__(self):
            yield from ROWS
            raise Broken("row 3 is\nno JSON")

    stub_datasets(monkeypatch, ROWS)
    monkeypatch.setattr(sys.modules["datasets"], "load_dataset", lambda *args, **kwargs: Rows())
    with pytest.raises(ValueError, match="--data a/b cannot be loaded: row 3 is no JSON"):
        read("a/b")


def test_what_cannot_be_read_is_refused(tmp_path, monkeypatch):
    stub_datasets(monkeypatch, ROWS)
    with pytest.raises(ValueError, match="--text-column must be a column of owner/name, .* got body"):
        read("owner/name", column="body")
    with pytest.raises(ValueError, match="--data must exist, got ./nothing"):
        read("./nothing")
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(ValueError, match="--data must hold text, got none in"):
        read(tmp_path / "empty.txt")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match="--data owner/name is no text file, .*: pip install datasets"):
        read("owner/name")


@pytest.mark.parametrize("count", [2000, 2019, 16000, 100000, 1000003])
def test_a_twentieth_in_blocks_of_stretches_is_held_out(count):
    text = torch.arange(count)
    training, held_out = hold_out(text, 100)
    assert len(held_out) >= 100 and len(training) == (HELD_OUT - 1) * len(held_out)
    assert not set(training.tolist()) & set(held_out.tolist())
    assert len(training) + len(held_out) > 0.9 * count
    assert (training.diff() > 0).all() and (held_out.diff() > 0).all()
    pieces = (held_out.diff() != 1).nonzero().flatten()
    starts = [0, *(pieces + 1).tolist(), len(held_out)]
    assert all(end - start >= 100 for start, end in zip(starts, starts[1:], strict=False))


def test_a_text_of_a_few_windows_is_refused():
    with pytest.raises(ValueError, match="--data must hold at least 20 stretches of --length 100, .* got 1999"):
        hold_out(torch.arange(1999), 100)
