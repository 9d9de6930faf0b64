"""Logits that a model asked for and that are never made: what its output layer returns while its loss is chunked."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from flash_dmattn_hf.thread_slot import ThreadSlot


@dataclass(frozen=True)
class DeferredLogits:
    """A note of operations(hidden weight^T + bias), which records what the model's own code does to its logits.

    hidden: (B, S, hidden size). weight: (vocabulary, hidden size). bias: (vocabulary,) or None.
    operations: as in `chunked_cross_entropy`. chunk_size, engine: as in `use_chunked_loss`.

    Whatever else than multiplying or dividing by a number, tanh and a cast to float32 is done to it raises TypeError.
    """

    hidden: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    chunk_size: int | None
    engine: str
    operations: str = ""

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.hidden.shape[:-1], self.weight.shape[0]))

    @property
    def device(self) -> torch.device:
        return self.hidden.device

    def _then(self, operation: str) -> "DeferredLogits":
        return replace(self, operations=f"{self.operations},{operation}" if self.operations else operation)

    def _scaled(self, sign: str, number: Any) -> "DeferredLogits":
        if not isinstance(number, int | float):
            raise _cannot_follow(f"{sign} a {type(number).__name__}")
        return self._then(f"{sign}{float(number)!r}")

    def __mul__(self, number: float) -> "DeferredLogits":
        return self._scaled("*", number)

    __rmul__ = __mul__

    def __truediv__(self, number: float) -> "DeferredLogits":
        return self._scaled("/", number)

    def tanh(self) -> "DeferredLogits":
        return self._then("tanh")

    def float(self) -> "DeferredLogits":
        return self._then("float32")

    def contiguous(self) -> "DeferredLogits":
        return self

    def __getitem__(self, index: Any) -> None:
        raise _cannot_follow("indexing")

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is torch.tanh and not kwargs:
            return args[0].tanh()
        raise _cannot_follow(getattr(function, "__name__", str(function)))


def _cannot_follow(operation: str) -> TypeError:
    return TypeError(
        f"the chunked loss cannot follow what this model does to its logits: {operation}; train without it"
    )


_deferring = ThreadSlot()
"""The output layer that defers in this thread, with its options."""


class DeferringLinear(nn.Linear):
    """An output layer that, between `defer` and `resume`, returns a note of its output instead of its output.

    Only in the thread that asked for it: another may generate with the same model meanwhile.
    """

    def defer(self, chunk_size: int | None, engine: str) -> None:
        _deferring.slot.content = (self, chunk_size, engine)

    def resume(self) -> None:
        _deferring.slot.content = None

    def forward(self, hidden: torch.Tensor) -> torch.Tensor | DeferredLogits:
        deferring = _deferring.slot.content
        if deferring is None or deferring[0] is not self:
            return super().forward(hidden)
        return DeferredLogits(hidden, self.weight, self.bias, *deferring[1:])
