"""What is tried with a tiny model of one type, and the verdict: right, partly, refused, wrong or not built."""

import contextlib
import inspect
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from checks.families.configs import VOCAB_SIZE, tiny_config
from flash_dmattn_hf import iter_gates

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "tests"))  # the definition is part of the tests

from hf.dense_definition import by_definition  # noqa: E402

WIDE = {"keep_window_size": 24}
NARROW = {"keep_window_size": 8, "num_sink_tokens": 2, "local_window_size": 3}
DOGE = {"keep_window_size": 8}  # its own mask has neither sinks nor a local window
LENGTH = 24
TOLERANCE = {torch.float64: 1e-5, torch.float32: 2e-4}
"""Largest difference that passes, as a part of the largest logit: many models compute norms in float32 anyway."""

COLUMNS = ("equal", "definition", "padding", "packing", "backward", "generate", "reload", "static")
WITHOUT_VERDICT = ("static",)
"""Columns that may be refused by a model that is right."""
PASSED = ("yes", "as eager", "no positions")


class Unequal(Exception):
    """Two ways to compute the same differ."""


def walk(model_type: str) -> dict[str, Any]:
    """Tries one model type. Returns its record: type, verdict, gates, outcome of every column, and the reason."""
    warnings.filterwarnings("ignore")
    record = {"model_type": model_type, "verdict": "not built", "gates": "", "tried": {}, "reason": ""}
    with tempfile.TemporaryDirectory() as folder:
        try:
            family = Family(model_type, Path(folder))
        except Exception as error:  # whatever a model of transformers raises is its reason
            return {**record, "reason": sentence(error)}
        try:
            family.ours(WIDE)(**family.inputs)
        except Exception as error:
            return {**record, "verdict": "refused" if is_ours(error) else "wrong", "reason": sentence(error)}
        record["gates"] = family.gates()
        for name in COLUMNS:
            record["tried"][name], reason = outcome(getattr(family, name))
            record["reason"] = record["reason"] or reason
    outcomes = [found for name, found in record["tried"].items() if name not in WITHOUT_VERDICT or found == "no"]
    is_right = all(result in PASSED for result in outcomes)
    record["verdict"] = "right" if is_right else "wrong" if "no" in outcomes else "partly"
    return record


class Family:
    """A tiny random eager model of one type, saved, and what is tried with it.

    Raises whatever transformers raises when the model cannot be made or run at all.
    """

    def __init__(self, model_type: str, folder: Path):
        self.folder = folder
        config = tiny_config(model_type)
        self.cls = MODEL_FOR_CAUSAL_LM_MAPPING[CONFIG_MAPPING[model_type]]
        if not isinstance(config, self.cls.config_class):  # a composite config, and the class of a part of it
            parts = [getattr(config, name) for name in config.sub_configs]
            config = next((part for part in parts if isinstance(part, self.cls.config_class)), config)
        config._experts_implementation = "eager"
        torch.manual_seed(0)
        self.eager = self.cls._from_config(config, attn_implementation="eager").eval()
        with torch.no_grad():
            for name, parameter in self.eager.named_parameters():
                if name.endswith("sinks"):  # zeros at first, which would hide that they are left out
                    parameter.normal_()
        self.inputs = {"input_ids": tokens(2, LENGTH)}
        self.dtype = self._dtype()
        self.eager.to(self.dtype)
        self.eager.save_pretrained(folder / "eager")
        self.loaded: dict[int, PreTrainedModel] = {}

    def _dtype(self) -> torch.dtype:
        """float64 where the model runs in it. The definition of Doge is its eager attention, which does not."""
        if self.eager.config.model_type == "doge":
            return torch.float32
        try:
            self.logits(self.eager.double(), **self.inputs)
        except RuntimeError:
            self.logits(self.eager.float(), **self.inputs)
            return torch.float32
        return torch.float64

    def ours(self, windows: dict[str, int]) -> PreTrainedModel:
        """The saved model loaded by name, with an importance far from zero if some keys are to be dropped."""
        if id(windows) in self.loaded:
            return self.loaded[id(windows)]
        is_doge = windows is NARROW and self.eager.config.model_type == "doge"
        model = self.load(self.folder / "eager", flash_dmattn=DOGE if is_doge else windows)
        if windows is NARROW:
            torch.manual_seed(1)
            with torch.no_grad():
                for _, _, gate in iter_gates(model):
                    owner = gate if hasattr(gate, "A") else gate.module  # Doge's own are in the attention module
                    owner.A.normal_()
                    owner.dt_proj.weight.normal_()
        self.loaded[id(windows)] = model
        return model

    def load(self, folder: Path, **options: Any) -> PreTrainedModel:
        options |= {"dtype": self.dtype, "attn_implementation": "flash_dmattn", "experts_implementation": "eager"}
        return self.cls.from_pretrained(folder, **options).to(self.dtype).eval()

    def gates(self) -> str:
        """How many of the layers that transformers calls attention have a gate."""
        model = self.ours(NARROW)
        num_layers = getattr(model.config.get_text_config(decoder=True), "num_hidden_layers", "?")
        return f"{sum(1 for _ in iter_gates(model))} of {num_layers}"

    def logits(self, model: PreTrainedModel, **inputs: Any) -> torch.Tensor:
        with torch.no_grad():
            return model(**inputs, use_cache=False).logits

    def compare(self, name: str, ours: torch.Tensor, expected: torch.Tensor) -> None:
        difference = float((ours - expected).abs().max())
        if not difference <= TOLERANCE[self.dtype] * max(float(expected.abs().max()), 1e-3):
            raise Unequal(f"{name} differs by {difference:.1e}")

    def equal(self) -> None:
        """Loaded by name, with a window that holds all tokens: the eager model."""
        expected = self.logits(self.eager, **self.inputs)
        self.compare("a wide window", self.logits(self.ours(WIDE), **self.inputs), expected)

    def definition(self) -> None:
        """With a narrow window: the mask written out, which changes the logits."""
        model = self.ours(NARROW)
        ours = self.logits(model, **self.inputs)
        with definition_of(model):
            self.compare("a narrow window", ours, self.logits(model, **self.inputs))
        with contextlib.suppress(Unequal):
            self.compare("", ours, self.logits(self.eager, **self.inputs))
            raise RuntimeError("a narrow window changes nothing, so nothing is tried")

    def padding(self) -> None:
        """Left padding, on both sides of the window."""
        mask = torch.ones(2, LENGTH, dtype=torch.long)
        mask[0, :5] = 0
        inputs, real = {**self.inputs, "attention_mask": mask}, mask.bool()
        for windows in (WIDE, NARROW):
            model = self.ours(windows)
            ours = self.logits(model, **inputs)
            with definition_of(model):  # eager attention in float64 is NaN where a row is all padding
                self.compare("padding", ours[real], self.logits(model, **inputs)[real])

    def packing(self) -> None:
        """Two documents in a row, told apart by their positions: as each of them alone."""
        self._packing(self.ours(NARROW))

    def _packing(self, model: PreTrainedModel) -> None:
        half = LENGTH // 2
        position_ids = torch.arange(half).repeat(2)[None].expand(2, -1)
        packed = self.logits(model, **self.inputs, position_ids=position_ids)
        alone = [self.logits(model, input_ids=ids) for ids in self.inputs["input_ids"].split(half, 1)]
        self.compare("packed documents", packed, torch.cat(alone, 1))

    def backward(self) -> None:
        """All gradients as by the definition."""
        model = self.ours(NARROW)
        gradients = []
        for context in (contextlib.nullcontext(), definition_of(model)):
            model.zero_grad()
            with context:
                model(**self.inputs, use_cache=False).logits.square().sum().backward()
            gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
        if gradients[0].keys() != gradients[1].keys():
            raise Unequal(f"gradients are missing: {sorted(gradients[0].keys() ^ gradients[1].keys())[0]}")
        scale = max(float(gradient.abs().max()) for gradient in gradients[1].values())
        for name, expected in gradients[1].items():
            self.compare(f"the gradient of {name}", gradients[0][name] / scale, expected / scale)

    def generate(self) -> None:
        """With a cache as without."""
        self._generate(self.ours(NARROW))

    def _generate(self, model: PreTrainedModel, **cache: Any) -> None:
        options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        options |= {"return_dict_in_generate": True, "output_logits": True}
        inputs = {"input_ids": self.inputs["input_ids"][:, :14]}
        kinds = {"use_cache": True, **cache}, {"use_cache": False}
        cached, uncached = (model.generate(**inputs, **options, **kind) for kind in kinds)
        self.compare("generation with a cache", torch.stack(cached.logits), torch.stack(uncached.logits))

    def static(self) -> None:
        """With a static cache as without."""
        self._static(self.ours(NARROW))

    def _static(self, model: PreTrainedModel) -> None:
        self._generate(model, cache_implementation="static")

    def reload(self) -> None:
        """Saved and loaded again: the same gates."""
        model = self.ours(NARROW)
        model.save_pretrained(self.folder / "ours")
        again = self.load(self.folder / "ours")
        self.compare("what was reloaded", self.logits(again, **self.inputs), self.logits(model, **self.inputs))

    def takes_positions(self) -> bool:
        return "position_ids" in inspect.signature(self.cls.forward).parameters

    def eager_does_it(self, name: str) -> bool:
        """Whether the eager model does what ours does not."""
        try:
            getattr(self, f"_{name}")(self.eager)
        except Exception:
            return False
        return True


@contextlib.contextmanager
def definition_of(model: PreTrainedModel) -> Iterator[None]:
    """Runs the model with the masks written out; native Doge with its own eager attention, which is one."""
    config = model.config
    if config.model_type != "doge":
        with by_definition(model):
            yield
        return
    layers = [module for _, module, _ in iter_gates(model)]
    before, sizes = config._attn_implementation, [layer.keep_window_size for layer in layers]
    config._attn_implementation_internal = "eager"
    for layer in layers:
        layer.keep_window_size = layer.dma.config.keep_window_size
    try:
        yield
    finally:
        config._attn_implementation_internal = before
        for layer, size in zip(layers, sizes, strict=True):
            layer.keep_window_size = size


def outcome(attempt: Callable) -> tuple[str, str]:
    """Runs one column. Returns its outcome and, unless that is "yes", the reason in a sentence.

    "no positions": the model takes no position_ids, so nothing can be packed. "as eager": transformers' own attention
    does not do it either.
    """
    family, name = attempt.__self__, attempt.__name__
    if name == "packing" and not family.takes_positions():
        return "no positions", ""
    try:
        attempt()
    except Exception as error:
        if name in ("packing", "generate", "static") and not family.eager_does_it(name):
            return "as eager", ""
        return ("refused" if is_ours(error) else "no"), f"{name}: {sentence(error)}"
    return "yes", ""


def is_ours(error: Exception) -> bool:
    """Whether this package refused, with one of the errors that it raises for what it does not support."""
    where = traceback.extract_tb(error.__traceback__)[-1].filename
    return isinstance(error, (ValueError, RuntimeError)) and "/flash_dmattn" in where


def sentence(error: Exception) -> str:
    """The first sentence of an error, without what breaks a table."""
    text = " ".join(str(error).split()).replace("|", "/") or type(error).__name__
    return text[:240].rstrip(".")


def tokens(batch: int, length: int) -> torch.Tensor:
    """(batch, length) ids without special ones, none of them twice in a row: equal tokens would tie."""
    generator = torch.Generator().manual_seed(0)
    return torch.stack([torch.randperm(VOCAB_SIZE - 8, generator=generator)[:length] + 4 for _ in range(batch)])


def causal_model_types() -> list[str]:
    """All model types of the installed transformers that have a causal language model."""
    return sorted(AutoModelForCausalLM._model_mapping._model_mapping)
