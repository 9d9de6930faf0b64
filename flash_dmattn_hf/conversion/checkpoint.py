"""Reading a dense checkpoint, whatever its file format, and writing a converted one all at once."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.utils import logging

PICKLES = (".bin", ".pt", ".pth")
INDEX = "model.safetensors.index.json"
NO_REMOTE_CODE = {"trust_remote_code": False}
"""Without it transformers would ask on the terminal."""


@dataclass(frozen=True)
class Source:
    """Where a model comes from.

    path: a local directory or the id of a repository on the Hub. gguf_file: name of the GGUF file in it.
    pickle: the single weights file to read with weights_only, when it has no name that transformers knows.
    """

    path: str
    gguf_file: str | None = None
    pickle: str | None = None

    @property
    def is_local(self) -> bool:
        return Path(self.path).is_dir()


def find_source(model: str, *, allow_pickle: bool = False) -> Source:
    """Finds the weights of `model` and checks that they are whole, without loading them.

    model: a directory, a .gguf file, or a Hub id. Raises ValueError naming the file that is missing,
    truncated or not allowed.
    """
    path = Path(model).expanduser()
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise ValueError(f"MODEL must be a directory, a .gguf file or a Hub id, got the file {path}")
        check_gguf(path)
        return Source(str(path.parent), gguf_file=path.name)
    if path.is_dir():
        return _local_source(path, allow_pickle)
    if model.count("/") > 1 or model.startswith((".", "/", "~")) or model.endswith(".gguf"):
        raise ValueError(f"MODEL must exist, got {model}")
    return _hub_source(model, allow_pickle)


def _local_source(path: Path, allow_pickle: bool) -> Source:
    files = sorted(entry.name for entry in path.iterdir() if entry.is_file())
    tensors = [name for name in files if name.endswith(".safetensors") and not name.startswith("adapter_")]
    ggufs = [name for name in files if name.lower().endswith(".gguf")]
    if tensors or INDEX in files:
        _check_config(path)
        check_safetensors(path)
        return Source(str(path))
    if ggufs:
        name = _only(ggufs, path)
        check_gguf(path / name)
        return Source(str(path), gguf_file=name)
    pickles = [name for name in files if name.endswith(PICKLES)]
    if not pickles:
        raise ValueError(f"{path} must contain model weights (safetensors or GGUF), but it has none")
    _refuse_pickle(pickles, path, allow_pickle)
    _check_config(path)
    known = [name for name in pickles if name.startswith("pytorch_model")]
    return Source(str(path), pickle=None if known else _only(pickles, path))


def _hub_source(model: str, allow_pickle: bool) -> Source:
    from huggingface_hub import HfApi, constants, try_to_load_from_cache

    if isinstance(try_to_load_from_cache(model, "config.json"), str):
        return Source(model)
    if constants.HF_HUB_OFFLINE:
        raise ValueError(
            f"MODEL must be a local path or in the cache of the Hub while HF_HUB_OFFLINE is set, got {model}"
        )
    try:
        files = HfApi().list_repo_files(model)
    except Exception as error:
        raise ValueError(
            f"MODEL must be a local path or a repository of the Hub, got {model}: {first_line(error)}"
        ) from error
    if any(name.endswith(".safetensors") and "/" not in name for name in files):
        return Source(model)
    if ggufs := [name for name in files if name.lower().endswith(".gguf")]:
        return Source(model, gguf_file=_only(ggufs, model))
    _refuse_pickle([name for name in files if name.endswith(PICKLES)], model, allow_pickle)
    return Source(model)


def _only(names: list[str], path: Path | str) -> str:
    if len(names) > 1:
        raise ValueError(f"{path} must contain one weights file of its kind, got {len(names)}: {', '.join(names)}")
    return names[0]


def _refuse_pickle(names: list[str], path: Path | str, allow_pickle: bool) -> None:
    if names and not allow_pickle:
        raise ValueError(
            f"{path} has only pickled weights ({names[0]}), which could hide code: pass --allow-pickle to read "
            "them with weights_only, or use a safetensors checkpoint"
        )


def _check_config(path: Path) -> None:
    file = path / "config.json"
    if not file.is_file():
        raise ValueError(f"{path} must contain config.json")
    read_json(file)


def read_json(file: Path) -> dict:
    """Returns what a JSON file holds. Raises ValueError naming the file if it is no JSON."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} must be JSON: {error}") from error


def check_safetensors(path: Path) -> None:
    """Raises ValueError naming the first safetensors file of a checkpoint that is missing or not whole."""
    names = ["model.safetensors"]
    if (path / INDEX).is_file() and not (path / names[0]).is_file():
        names = sorted(set(read_json(path / INDEX).get("weight_map", {}).values()))
    for name in names:
        if not (path / name).is_file():
            raise ValueError(f"{path / name} must exist")
        try:
            with safe_open(path / name, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path / name} must be a whole safetensors file: {first_line(error)}") from error


def check_gguf(file: Path) -> None:
    """Raises ValueError naming the file unless it is a whole GGUF file."""
    with open(file, "rb") as stream:
        if stream.read(4) != b"GGUF":
            raise ValueError(f"{file} must be a GGUF file, but does not start with GGUF")
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise ValueError(f"{file} needs the package gguf: pip install gguf") from error
    try:
        end = max((int(t.data_offset + t.n_bytes) for t in GGUFReader(file).tensors), default=0)
    except Exception as error:  # the reader has no error of its own: what it raises depends on where the file ends
        raise ValueError(f"{file} must be a whole GGUF file: {first_line(error)}") from error
    if end > os.path.getsize(file):
        raise ValueError(f"{file} must be a whole GGUF file of {end} bytes, got {os.path.getsize(file)}")


def load_model(source: Source, *, dtype: torch.dtype | str = "auto", allow_pickle: bool = False) -> PreTrainedModel:
    """Loads a causal language model, in its own dtype unless another is given; GGUF weights are dequantized.

    Code that comes with a checkpoint is never run. Raises ValueError when the checkpoint lacks weights of
    the model or they do not fit it.
    """
    if source.pickle:
        return _load_pickle(source, dtype)
    options = {"dtype": dtype, "output_loading_info": True, "weights_only": True, **NO_REMOTE_CODE}
    if source.gguf_file:
        options.update(gguf_file=source.gguf_file, quantization_config=GgufConfig(dequantize=True))
    elif not allow_pickle:
        options["use_safetensors"] = True
    with _naming(source), _without_load_report():
        model, info = AutoModelForCausalLM.from_pretrained(source.path, ignore_mismatched_sizes=True, **options)
    _check_complete(source, info["missing_keys"])
    for key, found, needed in info["mismatched_keys"]:
        raise ValueError(
            f"{source.path} must fit its config.json, which needs {key} of shape {tuple(needed)}, got {tuple(found)}"
        )
    return model


def _load_pickle(source: Source, dtype: torch.dtype | str) -> PreTrainedModel:
    file = Path(source.path) / source.pickle
    try:
        weights = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling raises whatever the damage happens to trip over
        raise ValueError(f"{file} must be a state dict that weights_only can read: {first_line(error)}") from error
    with _naming(source):
        config = AutoConfig.from_pretrained(source.path, **NO_REMOTE_CODE)
        dtype = config.dtype if dtype == "auto" else dtype
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, **NO_REMOTE_CODE)
        missing, _ = model.load_state_dict(weights, strict=False)
    model.tie_weights()
    tied = set(getattr(model, "_tied_weights_keys", None) or ())
    _check_complete(source, set(missing) - tied)
    return model.eval()


def _check_complete(source: Source, missing) -> None:
    missing = sorted(key for key in missing if ".dma." not in key)
    if missing:
        raise ValueError(f"{source.path} must contain all weights, but lacks {missing[0]} (of {len(missing)})")


def load_tokenizer(source: Source) -> Tokenizer | None:
    """Loads the tokenizer, None if the checkpoint has none."""
    options = {"gguf_file": source.gguf_file} if source.gguf_file else {}
    if not options and source.is_local and not _has_tokenizer(Path(source.path)):
        return None
    with _naming(source):
        return AutoTokenizer.from_pretrained(source.path, **options, **NO_REMOTE_CODE)


def _has_tokenizer(path: Path) -> bool:
    return any((path / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model"))


@contextmanager
def _naming(source: Source) -> Iterator[None]:
    """Turns whatever a damaged checkpoint makes transformers raise into a ValueError that names the checkpoint."""
    try:
        yield
    except (OSError, ImportError):
        raise
    except Exception as error:
        name = source.path if source.gguf_file is None else f"{source.path}/{source.gguf_file}"
        raise ValueError(f"{name} cannot be loaded: {first_line(error)}") from error


@contextmanager
def _without_load_report() -> Iterator[None]:
    """What the table of transformers would warn of is an error here."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def first_line(error: BaseException) -> str:
    """The message of an error in one line."""
    return " ".join(str(error).split()) or type(error).__name__
