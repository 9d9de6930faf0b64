"""The text that a model is distilled on: files, directories of files, or data sets; and what is held out of it."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase as Tokenizer

from flash_dmattn_hf.cli import common
from flash_dmattn_hf.conversion.checkpoint import first_line
from flash_dmattn_hf.progress import progress_bar

HELD_OUT = 20
"""One of so many blocks of the text is held out."""
BLOCK_STRETCHES = 8
"""Stretches of a block, where the text is long enough."""
TABLES = {".parquet": "parquet", ".json": "json", ".jsonl": "json", ".csv": "csv", ".arrow": "arrow"}
"""Suffix of a file that the package datasets reads -> its loader."""
ROWS = 256
"""Rows of a data set that are tokenized at once."""


def read_data(
    tokenizer: Tokenizer, items: Sequence[str], *, max_tokens: int, column: str, split: str, progress: bool
) -> torch.Tensor:
    """Returns the first max_tokens tokens of all items, (N,) int64, an end-of-text token after every document.

    items: each is a text file, a directory of .txt files, or a data set: a file of `TABLES`, a directory that the
        package datasets can load, or a name on the Hub.
    column, split: of a data set, with the text. Raises ValueError for an item that is none of these or holds no text.
    """
    end = torch.tensor([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id], dtype=torch.long)
    pieces, count = [], 0
    for item in items:
        before, documents = count, _documents(tokenizer, item, max_tokens, column, split)
        for tokens in progress_bar(documents, progress and f"reading {item}", unit="document"):
            pieces += [tokens, end]
            count += len(tokens) + len(end)
            if count >= max_tokens:
                return torch.cat(pieces)[:max_tokens]
        if count == before:
            raise ValueError(f"--data must hold text, got none in {item}")
    return torch.cat(pieces)


def hold_out(input_ids: torch.Tensor, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cuts a text into equal blocks; every `HELD_OUT`-th is held out. Returns the rest, and what is held out.

    length: tokens of a stretch; a block holds one at least. Raises ValueError for a text that is too short for that.
    """
    needed = HELD_OUT * length
    if len(input_ids) < needed:
        raise ValueError(
            f"--data must hold at least {HELD_OUT} stretches of --length {length}, which are {needed} tokens, "
            f"got {len(input_ids)}"
        )
    rounds = max(1, len(input_ids) // (needed * BLOCK_STRETCHES))
    blocks = input_ids[: len(input_ids) // (HELD_OUT * rounds) * HELD_OUT * rounds].view(rounds, HELD_OUT, -1)
    return blocks[:, :-1].flatten(), blocks[:, -1].flatten()


def _documents(tokenizer: Tokenizer, item: str, max_tokens: int, column: str, split: str) -> Iterator[torch.Tensor]:
    """Yields the tokens of every document of an item that is not empty."""
    path = Path(item).expanduser()
    files = _text_files(path)
    if files:
        documents = common.read_documents(tokenizer, files, max_tokens)
    else:
        documents = _rows(tokenizer, _texts(_load(item, path, split), item, column))
    return (tokens for tokens in documents if len(tokens))


def _text_files(path: Path) -> list[Path]:
    """Returns the files of an item that is text; none for a data set, whatever else its directory holds."""
    if path.is_file():
        return [] if path.suffix.lower() in TABLES else [path]
    return [] if _is_saved(path) else [file for file in sorted(path.rglob("*.txt")) if not file.is_dir()]


def _is_saved(path: Path) -> bool:
    """Whether a directory is what save_to_disk of the package datasets writes."""
    return (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file()


def _rows(tokenizer: Tokenizer, texts: Iterator[str]) -> Iterator[torch.Tensor]:
    while batch := list(islice(texts, ROWS)):
        for tokens in tokenizer(batch, add_special_tokens=False, verbose=False)["input_ids"]:
            yield torch.tensor(tokens, dtype=torch.long)


def _texts(data, item: str, column: str) -> Iterator[str]:
    """Yields the text of every row of a data set, "" where it has none."""
    with _loading(item):
        columns = data.column_names or list(next(iter(data), {}))
        rows = iter(data)
    if column not in columns:
        raise ValueError(f"--text-column must be a column of {item}, which has {columns}, got {column}")
    while True:
        with _loading(item):
            row = next(rows, None)
        if row is None:
            return
        if not isinstance(row[column], str | None):
            found = type(row[column]).__name__
            raise ValueError(f"--text-column must be a column of text, but {column} of {item} holds {found}")
        yield row[column] or ""


def _load(item: str, path: Path, split: str):
    """Returns a data set of the package datasets, streamed where it can be."""
    if not path.exists() and (item.startswith((".", "/", "~")) or item.count("/") > 1):
        raise ValueError(f"--data must exist, got {item}")
    try:
        import datasets
    except ImportError as error:
        raise ImportError(f"--data {item} is no text file, and data sets need: pip install datasets") from error
    with _loading(item):
        if path.is_file():
            loader = TABLES[path.suffix.lower()]
            return datasets.load_dataset(loader, data_files=str(path), split="train", streaming=True)
        if not _is_saved(path):
            return datasets.load_dataset(str(path) if path.is_dir() else item, split=split, streaming=True)
        data = datasets.load_from_disk(str(path))
    if not isinstance(data, dict):
        return data
    if split not in data:
        raise ValueError(f"--data-split must be one of {list(data)} in {item}, got {split}")
    return data[split]


@contextmanager
def _loading(item: str) -> Iterator[None]:
    """Errors inside the block become one ValueError, because loaders raise whatever their file formats do."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"--data {item} cannot be loaded: {first_line(error)}") from error
