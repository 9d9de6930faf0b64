"""What is tried with a tiny model of one type, and the verdict: right, partly, refused, wrong or not built."""

import contextlib
import inspect
import tempfile
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from checks.families.family import Family, Unequal, class_of, definition_of
from checks.families.images import NEEDS_IMAGE, image_token_of, said, takes_images
from checks.families.overrides import REQUIRED
from checks.families.sizes import LENGTH

COLUMNS = ("equal", "definition", "padding", "packing", "backward", "generate", "reload")
PASSED = ("yes", "as eager", "no positions")


def walk(task: str, model_type: str) -> dict[str, Any]:
    """Tries one model type. Returns its record: type, verdict, gates, outcome of every column, and the reason."""
    warnings.filterwarnings("ignore")
    with tempfile.TemporaryDirectory() as folder:
        try:
            family = Tries(task, model_type, Path(folder))
            if reason := family.refusal():  # before its inputs: a model that is refused anyway may need any
                return record_of(model_type, "refused", reason)
            if reason := family.does_not_apply():
                return record_of(model_type, "not tried", reason)
            family.make_inputs()
        except Exception as error:  # whatever a model of transformers raises is its reason
            is_hopeless = sentence(error) == failure_of_default(task, model_type)
            return record_of(model_type, "unbuildable" if is_hopeless else "not built", sentence(error))
        try:
            family.run(family.ours(family.wide), family.inputs)
        except Exception as error:
            return record_of(model_type, "refused" if is_ours(error) else "wrong", sentence(error))
        tried, reasons = {}, []
        for name in COLUMNS:
            tried[name], reason = outcome(getattr(family, name))
            reasons += [reason] if reason else []
        gates = family.gates()
    is_right = all(result in PASSED for result in tried.values())
    verdict = "right" if is_right else "wrong" if "no" in tried.values() else "partly"
    return {**record_of(model_type, verdict, next(iter(reasons), "")), "gates": gates, "tried": tried}


def record_of(model_type: str, verdict: str, reason: str) -> dict[str, Any]:
    """The record of a model type of which no column was tried."""
    return {"model_type": model_type, "verdict": verdict, "gates": "", "tried": {}, "reason": reason}


def failure_of_default(task: str, model_type: str) -> str:
    """Why transformers itself cannot make and call the model type with its default config; empty if it can."""
    try:
        with torch.device("meta"):
            config = CONFIG_MAPPING[model_type](**REQUIRED.get(model_type, {}))
            model = class_of(task, model_type)._from_config(config, attn_implementation="eager")
            ids, mask = (torch.ones((1, LENGTH), dtype=torch.long) for _ in range(2))
            model(input_ids=ids, attention_mask=mask, use_cache=False)
    except Exception as error:
        return sentence(error)
    return ""


class Tries(Family):
    """The columns of the table: each raises if it does not hold."""

    def does_not_apply(self) -> str:
        """Why the model does not take what is to be tried, text alone or with an image; empty if it does."""
        if self.has_image and not takes_images(self.cls):
            return "it takes no images"
        if not self.has_image and self.eager.config.model_type in NEEDS_IMAGE:
            return "it takes no text without an image"
        return ""

    def refusal(self) -> str:
        """The sentence with which this package refuses the model, whatever its inputs are; empty if it does not."""
        try:
            self.run(self.ours(self.wide), self.inputs)
        except Exception as error:
            return sentence(error) if is_ours(error) else ""
        return ""

    def equal(self) -> None:
        """Loaded by name, with a window that holds all tokens: the eager model."""
        self._equal(self.ours(self.wide))

    def _equal(self, model: PreTrainedModel) -> None:
        expected = self.logits(self.eager, self.inputs)
        self.compare("a wide window", self.logits(model, self.inputs), expected)

    def definition(self) -> None:
        """With a narrow window: the mask written out, which changes the logits."""
        model = self.ours(self.narrow)
        ours = self.logits(model, self.inputs)
        with definition_of(model):
            self.compare("a narrow window", ours, self.logits(model, self.inputs))
        with contextlib.suppress(Unequal):
            self.compare("", ours, self.logits(self.eager, self.inputs))
            raise RuntimeError("a narrow window changes nothing, so nothing is tried")

    def padding(self) -> None:
        """Left padding, on both sides of the window."""
        mask = torch.ones_like(self.inputs["input_ids"])
        mask[0, :5] = 0
        inputs, real = {**self.inputs, "attention_mask": mask}, mask.bool()
        for windows in (self.wide, self.narrow):
            model = self.ours(windows)
            ours = self.logits(model, inputs)
            with definition_of(model):  # eager attention in float64 is NaN where a row is all padding
                self.compare("padding", ours[real], self.logits(model, inputs)[real])

    def packing(self) -> None:
        """Two documents in a row, told apart by their positions: as each of them alone."""
        self._packing(self.ours(self.narrow))

    def _packing(self, model: PreTrainedModel) -> None:
        half, length = self.half, self.inputs["input_ids"].shape[1]
        position_ids = torch.arange(length).repeat(2, 1) % half
        documents = [cut(self.inputs, 0, half), cut(self.inputs, half, length)]
        if self.has_image:  # it is in the first document; without positions its tokens would get others
            documents[1] = {
                name: documents[1][name]
                for name in ("input_ids", "mm_token_type_ids", "token_type_ids")
                if name in documents[1]
            }
            documents = [
                {**document, "position_ids": position_ids[:, : document["input_ids"].shape[1]].contiguous()}
                for document in documents
            ]
        packed = self.logits(model, {**self.inputs, "position_ids": position_ids})
        alone = [self.logits(model, document) for document in documents]
        self.compare("packed documents", packed, torch.cat(alone, 1))

    def backward(self) -> None:
        """All gradients as by the definition."""
        model = self.ours(self.narrow)
        gradients = []
        for context in (contextlib.nullcontext(), definition_of(model)):
            model.zero_grad()
            with context:
                self.run(model, self.inputs).square().sum().backward()
            gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
        if gradients[0].keys() != gradients[1].keys():
            raise Unequal(f"gradients are missing: {sorted(gradients[0].keys() ^ gradients[1].keys())[0]}")
        scale = max(float(gradient.abs().max()) for gradient in gradients[1].values())
        for name, expected in gradients[1].items():
            self.compare(f"the gradient of {name}", gradients[0][name] / scale, expected / scale, factor=10)

    def generate(self) -> None:
        """With a cache as without."""
        self._generate(self.ours(self.narrow))

    def _generate(self, model: PreTrainedModel) -> None:
        options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        options |= {"return_dict_in_generate": True, "output_logits": True}
        inputs = cut(self.inputs, 0, self.half + 2)
        image_token = image_token_of(self.eager.config) if self.has_image else None
        if image_token is not None:  # a model that says it would have to see another image
            options["suppress_tokens"] = [image_token]
        found = [model.generate(**inputs, **options, use_cache=use_cache).logits for use_cache in (True, False)]
        self.compare("generation with a cache", *(said(torch.stack(logits)) for logits in found))

    def reload(self) -> None:
        """Saved and loaded again: the same gates."""
        model = self.ours(self.narrow)
        model.save_pretrained(self.folder / "ours")
        again = self.load(self.folder / "ours")
        self.compare("what was reloaded", self.logits(again, self.inputs), self.logits(model, self.inputs))

    def takes_positions(self) -> bool:
        return "position_ids" in inspect.signature(self.cls.forward).parameters

    def eager_does_it(self, name: str) -> bool:
        """Whether the eager model, loaded as ours is, does what ours does not."""
        try:
            getattr(self, f"_{name}")(self.load(self.folder / "eager", attn_implementation="eager"))
        except Exception:
            return False
        return True


def cut(inputs: dict[str, torch.Tensor], start: int, stop: int) -> dict[str, torch.Tensor]:
    """The inputs of some of the tokens: those of (B, T, ...) are cut, those of an image are not."""
    shape = inputs["input_ids"].shape
    return {name: value[:, start:stop] if value.shape[:2] == shape else value for name, value in inputs.items()}


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
        if hasattr(family, f"_{name}") and not family.eager_does_it(name):
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
    return text[:320].rstrip(".")
