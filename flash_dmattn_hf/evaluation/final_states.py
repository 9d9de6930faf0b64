"""Logits of chosen rows of a forward pass: those of all rows, tokens x vocabulary, never exist at once."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from flash_dmattn_hf.integration.uncompiled import uncompiled


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside the block the model is in eval mode and nothing has a gradient."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        if was_training:
            model.train()


def logits_of_rows(model: nn.Module, input_ids: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Returns the logits (R, vocabulary) of one forward pass without a cache at chosen positions.

    input_ids: (N,) integers. rows: (R,) integers from 0 to N - 1; row t predicts token t + 1.
    Raises ValueError for a model that does not call an output layer on one hidden state per token.
    """
    return _forward(model, input_ids, lambda states: states[:, rows.to(states.device)])


class FinalStates:
    """One forward pass without a cache, of which `logits` then gives any rows.

    The model's own code makes them from the hidden states, scaling and softcapping included: it runs again on one
    token, whose hidden state is replaced by those of the rows.

    input_ids: (N,) integers. Raises ValueError as `logits_of_rows`.
    """

    def __init__(self, model: nn.Module, input_ids: torch.Tensor) -> None:
        self._model, self._first = model, input_ids[:1]

        def keep(states: torch.Tensor) -> torch.Tensor:
            self._states = states
            return states[:, :1]

        _forward(model, input_ids, keep)

    def logits(self, rows: slice) -> torch.Tensor:
        """Returns the logits (R, vocabulary) of these positions."""
        return _forward(self._model, self._first, lambda _: self._states[:, rows])


def _forward(model: nn.Module, input_ids: torch.Tensor, change: Callable) -> torch.Tensor:
    """Returns the logits of a forward pass whose output layer gets `change` of its input (1, N, hidden size)."""
    # A PeftModel's layers are inside the model that it wraps; FSDP2 needs the forward of the whole.
    inner, calls = model.get_base_model() if hasattr(model, "get_base_model") else model, []
    head = inner.get_output_embeddings()
    if head is None:
        raise ValueError(f"model must have an output layer, got {type(model).__name__}")

    def replace(module, arguments):
        states = arguments[0]
        if states.shape[:2] != (1, len(input_ids)):
            raise ValueError(
                f"the output layer must get (1, {len(input_ids)}, hidden size), got {tuple(states.shape)} in "
                f"{type(model).__name__}"
            )
        calls.append(module)
        return (change(states), *arguments[1:])

    device = inner.get_input_embeddings().weight.device
    handle = head.register_forward_pre_hook(replace)
    try:
        with torch.no_grad(), uncompiled(model):
            logits = model(input_ids=input_ids[None].to(device), use_cache=False).logits[0]
    finally:
        handle.remove()
    if not calls:
        raise ValueError(f"model must call its output layer, which {type(model).__name__} does not")
    return logits
