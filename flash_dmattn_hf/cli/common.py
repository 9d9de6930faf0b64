"""What several commands share: options, loading, reading text."""

import argparse
from collections.abc import Iterable, Iterator
from itertools import chain, islice, repeat
from pathlib import Path

import torch
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from flash_dmattn_hf.conversion.checkpoint import Source, load_model, load_tokenizer

DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")
CHUNK = 1 << 18
"""Characters of a piece of text: the tokenizer gets a few times as many in one, however long a line is."""


def add_model_options(parser: argparse.ArgumentParser, *, dtype: bool = True) -> None:
    """Adds what `load` reads; dtype: whether it can be chosen."""
    if dtype:
        parser.add_argument("--dtype", choices=DTYPES, default="auto", help="default: the checkpoint's own")
    parser.add_argument("--device", help="default: cuda if there is one, else cpu")
    parser.add_argument(
        "--allow-pickle", action="store_true", help="read .bin and .pt weights too (with weights_only)"
    )


def positive(text: str) -> int:
    """argparse type: an integer of at least 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return number


def not_negative(text: str) -> int:
    """argparse type: an integer of at least 0."""
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"must be at least 0, got {text}")
    return number


def positive_list(text: str) -> list[int]:
    """argparse type: integers of at least 1, separated by commas; sorted, each once."""
    try:
        numbers = sorted({int(part) for part in text.split(",")})
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be integers separated by commas, got {text!r}") from None
    if numbers[0] < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {numbers[0]}")
    return numbers


def text_file(text: str) -> Path:
    """argparse type: an existing file."""
    path = Path(text).expanduser()
    if not path.is_file():
        raise argparse.ArgumentTypeError(f"must be a file, got {text}")
    return path


def check_folder(path: Path | None, option: str) -> None:
    """Raises ValueError if a file to write is not in an existing directory, or is one itself."""
    if path is None:
        return
    path = path.expanduser().absolute()
    if path.is_dir():
        raise ValueError(f"{option} must be a file, got the directory {path}")
    if not path.parent.is_dir():
        raise ValueError(f"{option} must be in an existing directory, got {path}")


def choose_device(name: str | None) -> torch.device:
    """Returns the device; ValueError for one that torch does not know or that is not there."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"--device must be a device of this machine, got {name}") from error


def load(source: Source, args: argparse.Namespace) -> PreTrainedModel:
    """Loads the model of a command onto its device."""
    device = choose_device(args.device)
    dtype = args.dtype if args.dtype == "auto" else getattr(torch, args.dtype)
    return load_model(source, dtype=dtype, allow_pickle=args.allow_pickle).to(device).eval()


def check_differs(out: Path, source: Source) -> None:
    """Raises ValueError if OUT, an absolute path, is where the model comes from."""
    if source.is_local and out.resolve() == Path(source.path).resolve():
        raise ValueError(f"OUT must differ from MODEL, got {out} for both")


def check_length(model: PreTrainedModel, length: int, option: str) -> None:
    """Raises ValueError if a sequence is longer than the model's table of position embeddings, if it has one."""
    config = model.config.get_text_config(decoder=True)
    longest = getattr(config, "max_position_embeddings", None)
    if longest is not None and length > longest and getattr(config, "rope_parameters", None) is None:
        raise ValueError(f"{option} must not make sequences longer than {longest}, the model's limit, got {length}")


def need_tokenizer(source: Source) -> Tokenizer:
    """Loads the tokenizer; ValueError if the checkpoint has none."""
    tokenizer = load_tokenizer(source)
    if tokenizer is None:
        raise ValueError(f"{source.path} must contain a tokenizer to read text, but has none")
    return tokenizer


def read_tokens(tokenizer: Tokenizer, path: Path, max_tokens: int) -> torch.Tensor:
    """Returns the first max_tokens tokens of a UTF-8 text, (N,) int64, without special tokens.

    Reads little more of the file than is needed. Raises ValueError if the file is not UTF-8.
    """
    return next(read_documents(tokenizer, [path], max_tokens))


def read_documents(tokenizer: Tokenizer, paths: Iterable[Path], max_tokens: int) -> Iterator[torch.Tensor]:
    """Yields the tokens of each text as `read_tokens` does; the last is the one that has max_tokens, if any has.

    Several pieces of text are tokenized at once, because the tokenizer shares them among the cores.
    """
    pieces = _pieces(paths)
    tokens: list[int] = []
    for count in chain((1, 2, 4, 8), repeat(16)):  # the beginning of a text is all that some callers need
        batch = list(islice(pieces, count))
        texts = [piece for piece in batch if piece is not None]
        found = iter(tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else ())
        for piece in batch:
            if piece is not None:
                tokens += next(found)
            is_full = len(tokens) >= max_tokens
            if piece is None or is_full:
                yield torch.tensor(tokens[:max_tokens], dtype=torch.long)
                tokens = []
            if is_full:
                return
        if len(batch) < count:
            return


def _pieces(paths: Iterable[Path]) -> Iterator[str | None]:
    """Yields each text in pieces of about CHUNK characters, and then None.

    A piece ends at the end of a line, or in front of a space where a line goes on for another CHUNK characters.
    """
    for path in paths:
        try:
            with open(path, encoding="utf-8") as stream:
                rest = ""
                while chunk := stream.read(CHUNK):
                    end_of_line = stream.readline(CHUNK)
                    piece, rest = rest + chunk + end_of_line, ""
                    if len(end_of_line) == CHUNK and (space := piece.rfind(" ")) > 0:
                        piece, rest = piece[:space], piece[space:]
                    yield piece
                if rest:
                    yield rest
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} must be UTF-8 text: {error}") from error
        yield None
