"""A tiny model of one type: built, saved, loaded by name, and run."""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from checks.families.configs import tiny_config
from checks.families.images import has_prefix, image_inputs, said, token_types
from checks.families.sizes import LENGTH, VOCAB_SIZE
from flash_dmattn_hf import iter_gates

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "tests"))  # the definition is part of the tests

from hf.dense_definition import by_definition  # noqa: E402

NARROW = {"keep_window_size": 8, "num_sink_tokens": 2, "local_window_size": 3}
NARROW_WITH_IMAGE = {"keep_window_size": 9, "num_sink_tokens": 1, "local_window_size": 5}
"""An image whose tokens see each other must fit into the local window."""
NARROW_WITH_PREFIX = {"keep_window_size": 14, "num_sink_tokens": 1, "local_window_size": 10}
"""The same for a prefix with an image in it."""
DOGE = {"keep_window_size": 8}  # its own mask has neither sinks nor a local window
TOLERANCE = {torch.float64: 1e-5, torch.float32: 2e-4}
"""Largest difference that passes, as a part of the largest logit: many models compute norms in float32 anyway."""

TASKS = {
    "causal": AutoModelForCausalLM,
    "text": AutoModelForImageTextToText,
    "image": AutoModelForImageTextToText,
}
"""What is tried, and the class that loads it: a causal language model; a model of images and text, with text alone; the
same with an image in it."""


class Unequal(Exception):
    """Two ways to compute the same differ."""


class Family:
    """A tiny random eager model of one type, saved. Raises whatever transformers raises if it cannot be made.

    inputs: what it is called with, once `make_inputs` has run. half: how many of its tokens have the image among them.
    wide, narrow: windows that hold all tokens, and some.
    """

    def __init__(self, task: str, model_type: str, folder: Path):
        self.folder = folder
        self.has_image = task == "image"
        config = tiny_config(model_type)
        self.auto, self.cls = TASKS[task], class_of(task, model_type)
        if not isinstance(config, self.cls.config_class):  # a composite config, and the class of a part of it
            parts = [getattr(config, name) for name in config.sub_configs]
            config = next((part for part in parts if isinstance(part, self.cls.config_class)), config)
        config._experts_implementation = "eager"
        torch.manual_seed(0)
        self.eager = self.cls._from_config(config, attn_implementation="eager").eval()
        with torch.no_grad():
            for name, parameter in self.eager.named_parameters():
                if not parameter.any():  # zeros at first would hide that they are left out
                    parameter.normal_(std=1.0 if name.endswith("sinks") else 0.02)
        self.narrow = NARROW_WITH_IMAGE if self.has_image else NARROW
        if has_prefix(self.eager):
            self.narrow = NARROW_WITH_PREFIX
        types = token_types(self.eager, tokens(LENGTH)) if task != "causal" else {}
        self._use({"input_ids": tokens(LENGTH), **types})
        self.dtype = torch.float32
        self.loaded: dict[int, PreTrainedModel] = {}
        self.eager.save_pretrained(folder / "eager")

    def make_inputs(self) -> None:
        """Makes the inputs and chooses a dtype. Raises whatever the eager model raises if it does not take them.

        float64 where the model runs in it. The definition of Doge is its eager attention, which does not.
        """
        if self.has_image:
            self._use(image_inputs(self.eager, tokens))
        inputs = self.inputs
        self.logits(self.eager, inputs)
        if self.eager.config.model_type != "doge":
            is_float = {name: value.is_floating_point() for name, value in inputs.items()}
            self.inputs = {name: value.double() if is_float[name] else value for name, value in inputs.items()}
            self.dtype = torch.float64
            try:
                self.logits(self.eager.double(), self.inputs)
            except RuntimeError:
                self.inputs, self.dtype = inputs, torch.float32
        self.loaded.clear()
        self.eager.to(self.dtype).save_pretrained(self.folder / "eager")

    def _use(self, inputs: dict[str, torch.Tensor]) -> None:
        self.inputs, length = inputs, inputs["input_ids"].shape[1]
        self.half, self.wide = length - LENGTH // 2, {"keep_window_size": length}

    def ours(self, windows: dict[str, int]) -> PreTrainedModel:
        """The saved model loaded by name, with an importance far from zero if some keys are to be dropped."""
        if id(windows) in self.loaded:
            return self.loaded[id(windows)]
        is_doge = windows is self.narrow and self.eager.config.model_type == "doge"
        model = self.load(self.folder / "eager", flash_dmattn=DOGE if is_doge else windows)
        if windows is self.narrow:
            torch.manual_seed(1)
            with torch.no_grad():
                for _, _, gate in iter_gates(model):
                    owner = gate if hasattr(gate, "A") else gate.module  # Doge's own are in the attention module
                    owner.A.normal_()
                    owner.dt_proj.weight.normal_()
        self.loaded[id(windows)] = model
        return model

    def load(self, folder: Path, **options: Any) -> PreTrainedModel:
        """A saved model, by default with our attention; by its class if the Auto class does not know its config."""
        loader = self.auto if type(self.eager.config) in self.auto._model_mapping else self.cls
        options = {"attn_implementation": "flash_dmattn", "experts_implementation": "eager", **options}
        return loader.from_pretrained(folder, dtype=self.dtype, **options).to(self.dtype).eval()

    def gates(self) -> str:
        """How many of the layers that transformers calls attention have a gate."""
        model = self.ours(self.narrow)
        num_layers = getattr(model.config.get_text_config(decoder=True), "num_hidden_layers", "?")
        return f"{sum(1 for _ in iter_gates(model))} of {num_layers}"

    def run(self, model: PreTrainedModel, inputs: dict[str, Any]) -> torch.Tensor:
        """The logits of a model, without a cache."""
        return said(model(**inputs, use_cache=False).logits)

    def logits(self, model: PreTrainedModel, inputs: dict[str, Any]) -> torch.Tensor:
        """The same without gradients."""
        with torch.no_grad():
            return self.run(model, inputs)

    def compare(self, name: str, ours: torch.Tensor, expected: torch.Tensor, factor: float = 1.0) -> None:
        """Raises Unequal if two tensors differ by more than rounding, times a factor."""
        difference = float((ours - expected).abs().max())
        if not difference <= factor * TOLERANCE[self.dtype] * max(float(expected.abs().max()), 1e-3):
            raise Unequal(f"{name} differs by {difference:.1e}")


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


def tokens(length: int) -> torch.Tensor:
    """(2, length) ids without special ones, in a row none again before all were there: equal tokens would tie."""
    generator, index = torch.Generator().manual_seed(0), torch.arange(length) % (VOCAB_SIZE - 8)
    return torch.stack([torch.randperm(VOCAB_SIZE - 8, generator=generator)[index] + 4 for _ in range(2)])


def model_types(task: str) -> list[str]:
    """All model types of the installed transformers that have a class for a task."""
    return sorted(TASKS[task]._model_mapping._model_mapping)


def class_of(task: str, model_type: str) -> type[PreTrainedModel]:
    """The class that has a model type for a task."""
    return TASKS[task]._model_mapping[CONFIG_MAPPING[model_type]]
