"""Makes a causal language model compute its loss in chunks of tokens, whoever trains it.

While a forward with labels runs, the output layer returns a note of its logits (`DeferredLogits`). The model's own code
scales or softcaps the note and hands it to the model's loss function, which here computes the loss from hidden states
and weight. So no forward is rewritten, and an unmodified Trainer needs to know nothing.
"""

import functools
import inspect
from collections.abc import Callable
from types import MethodType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss

from flash_dmattn_hf.gates.wrapped import find_pretrained
from flash_dmattn_hf.training import liger
from flash_dmattn_hf.training.chunked_cross_entropy import chunked_cross_entropy
from flash_dmattn_hf.training.deferred_logits import DeferredLogits, DeferringLinear, check_output_layer_of

SETTINGS = "_flash_dmattn_chunked_loss"
"""Attribute of a model with a chunked loss: its `Settings`."""
ENGINES = ("auto", "liger", "torch")


class Settings(NamedTuple):
    chunk_size: int | None
    engine: str
    in_evaluation: bool


def use_chunked_loss(
    model: nn.Module, *, chunk_size: int | None = None, engine: str = "auto", in_evaluation: bool = True
) -> "ChunkedLoss":
    """Lets `model(..., labels=...)` return its loss without ever holding the logits; its output then has none.

    Loss and gradients are those of transformers' causal language model loss, `num_items_in_batch` and scaled or
    softcapped logits included. Calls without labels, so generation too, are as before. To be called before the model
    is given to a Trainer or compiled.

    model: a causal language model of transformers, or what holds one (PEFT, compiled, DDP, FSDP).
    chunk_size: tokens whose logits exist at once; None: `chunked_loss.CHUNK_ENTRIES` logits.
    engine: "liger" for Liger-Kernel's, "torch" for ours; "auto" takes the first that can serve.
    in_evaluation: also in eval mode; with False a model in eval mode returns its logits, for metrics that need them.

    Returns what undoes it: `.remove()`, or the end of a `with` block. Raises ValueError for a model whose output layer
    is no plain linear layer, or whose loss is not transformers' causal language model loss.
    """
    wrapped, model = model, find_pretrained(model)
    if engine not in ENGINES:
        raise ValueError(f"engine must be one of {list(ENGINES)}, got {engine!r}")
    if chunk_size is not None and (type(chunk_size) is not int or chunk_size < 1):
        raise ValueError(f"chunk_size must be None or an integer of at least 1, got {chunk_size!r}")
    if engine == "liger" and not liger.is_installed():
        raise ValueError("engine must be auto or torch where liger-kernel is not installed, got 'liger'")
    if model is None:
        raise ValueError(f"model must be a model of transformers, got {type(wrapped).__name__}")
    _check_model(model)
    return ChunkedLoss(model, Settings(chunk_size, engine, in_evaluation))


class ChunkedLoss:
    """A model's chunked loss, from `use_chunked_loss`, until `remove()` or the end of a `with` block."""

    def __init__(self, model: PreTrainedModel, settings: Settings) -> None:
        self._model = model
        self._head = model.get_output_embeddings()
        self._attributes = {name: vars(model)[name] for name in ("forward", "_loss_function") if name in vars(model)}
        self._forward = _wrap_forward(model.forward.__func__)
        setattr(model, SETTINGS, settings)
        model.forward = MethodType(self._forward, model)
        model.loss_function = causal_lm_loss
        self._head.__class__ = DeferringLinear

    def remove(self) -> None:
        """Gives the model its own loss and output layer back; does nothing if that has been done."""
        model = self._model
        if getattr(model, SETTINGS, None) is None:
            return
        delattr(model, SETTINGS)
        self._head.__class__ = nn.Linear
        _restore(model, "_loss_function", self._attributes)
        # Where a Trainer has wrapped the forward since, ours stays inside and hands everything on.
        if getattr(model.forward, "__func__", None) is self._forward:
            _restore(model, "forward", self._attributes)

    def __enter__(self) -> "ChunkedLoss":
        return self

    def __exit__(self, *_: Any) -> None:
        self.remove()


def causal_lm_loss(
    logits: torch.Tensor | DeferredLogits,
    labels: torch.Tensor,
    vocab_size: int,
    num_items_in_batch: torch.Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: torch.Tensor | None = None,
    **kwargs: Any,
) -> torch.Tensor:
    """transformers' loss of a causal language model, in chunks where the logits are deferred.

    logits: (B, S, vocabulary). labels: (B, S), the tokens themselves; shift_labels: (B, S), the tokens after them.
    num_items_in_batch: what the sum over tokens is divided by; None: how many tokens have a label.
    Raises ValueError for another vocab_size or number of labels than the logits have.
    """
    if not isinstance(logits, DeferredLogits):
        return ForCausalLMLoss(logits, labels, vocab_size, num_items_in_batch, ignore_index, shift_labels, **kwargs)
    if vocab_size != logits.shape[-1]:
        raise ValueError(f"vocab_size must be that of the output layer, {logits.shape[-1]}, got {vocab_size}")
    if shift_labels is None:
        shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    targets = shift_labels.reshape(-1).to(logits.device)
    hidden, weight, bias = logits.operands()
    if hidden.shape[0] != targets.shape[0]:
        raise ValueError(f"labels must have shape {tuple(logits.shape[:-1])}, got {tuple(shift_labels.shape)}")
    if _takes_liger(logits, hidden):
        loss = liger.cross_entropy(hidden, weight, targets, bias, logits.operations, ignore_index)
    else:
        loss = chunked_cross_entropy(
            hidden,
            weight,
            targets,
            bias,
            operations=logits.operations,
            ignore_index=ignore_index,
            chunk_size=logits.chunk_size,
        )
    if num_items_in_batch is None:
        num_items_in_batch = (targets != ignore_index).sum()
    elif torch.is_tensor(num_items_in_batch):
        num_items_in_batch = num_items_in_batch.to(loss.device)
    return loss / num_items_in_batch


def _takes_liger(logits: DeferredLogits, hidden: torch.Tensor) -> bool:
    if logits.engine == "torch" or torch.compiler.is_compiling():
        return False
    reason = liger.reject(hidden, logits.operations)
    if reason is not None and logits.engine == "liger":
        raise ValueError(f"engine must be auto or torch, got 'liger': {reason}")
    return reason is None


def _wrap_forward(original: Callable) -> Callable:
    position = list(inspect.signature(original).parameters).index("labels") - 1

    @functools.wraps(original)
    def forward(self, *args, **kwargs):
        settings = getattr(self, SETTINGS, None)
        labels = args[position] if len(args) > position else kwargs.get("labels")
        if settings is None or labels is None or not (self.training or settings.in_evaluation):
            return original(self, *args, **kwargs)
        head = self.get_output_embeddings()
        head.defer(settings.chunk_size, settings.engine)
        try:
            output = original(self, *args, **kwargs)
        finally:
            head.resume()
        return _without_logits(output)

    return forward


def _without_logits(output: Any) -> Any:
    """Takes the note of the logits out of a model's output, a ModelOutput or a tuple. RuntimeError without one."""
    values = output if isinstance(output, tuple) else tuple(output.values())
    if not any(isinstance(value, DeferredLogits) for value in values):
        raise RuntimeError("the chunked loss was not used: the model's forward never called its output layer")
    if isinstance(output, tuple):
        return tuple(value for value in output if not isinstance(value, DeferredLogits))
    kept = {name: value for name, value in output.items() if not isinstance(value, DeferredLogits)}
    return type(output)(**kept)


def _restore(model: nn.Module, name: str, attributes: dict[str, Any]) -> None:
    delattr(model, name)
    if name in attributes:
        setattr(model, name, attributes[name])


def _check_model(model: PreTrainedModel) -> None:
    name = type(model).__name__
    if getattr(model, SETTINGS, None) is not None:
        raise ValueError(f"{name} has a chunked loss already: remove() it first")
    if (
        inspect.unwrap(model.loss_function) is not ForCausalLMLoss
        or "labels" not in inspect.signature(model.forward).parameters
    ):
        raise ValueError(f"model must have transformers' causal language model loss, got {name}")
    if not isinstance(model.forward, MethodType):
        raise ValueError(f"the forward of {name} must be a method, got {type(model.forward).__name__}")
    check_output_layer_of(model)
