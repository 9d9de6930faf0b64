"""Logits that a model asked for and that are never made: what its output layer returns while its loss is chunked."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from flash_dmattn_hf.thread_slot import ThreadSlot

_NEEDS_WHOLE_WEIGHT = "the chunked loss needs the whole weight of the output layer, got one sharded over devices"


@dataclass(frozen=True)
class DeferredLogits:
    """A note of operations(hidden weight^T + bias), which records what the model's own code does to its logits.

    hidden: (B, S, hidden size). weight: (vocabulary, hidden size). bias: (vocabulary,) or None.
    operations: as in `chunked_cross_entropy`. chunk_size, engine: as in `use_chunked_loss`.
    autocast: the dtype to which autocast would have brought the product; None without autocast.

    Whatever else than multiplying or dividing by a number, tanh and a cast to float32 is done to it raises TypeError.
    """

    hidden: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    chunk_size: int | None
    engine: str
    operations: str = ""
    autocast: torch.dtype | None = None

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.hidden.shape[:-1], self.weight.shape[0]))

    @property
    def device(self) -> torch.device:
        return self.hidden.device

    def operands(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Returns hidden (N, hidden size), weight and bias in the dtype in which the output layer would compute.

        Raises ValueError for a weight that is sharded over devices.
        """
        hidden, weight, bias = self.hidden, self.weight, self.bias
        if isinstance(weight, DTensor) or weight.dim() != 2 or _is_freed(weight):
            raise ValueError(_NEEDS_WHOLE_WEIGHT)
        if self.autocast is not None:
            hidden, weight = hidden.to(self.autocast), weight.to(self.autocast)
            bias = None if bias is None else bias.to(self.autocast)
        return hidden.reshape(-1, hidden.shape[-1]), weight, bias

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


def _is_freed(weight: torch.Tensor) -> bool:
    """Whether a sharding wrapper around the output layer alone has taken the weight away again."""
    return not torch.compiler.is_compiling() and weight.untyped_storage().nbytes() == 0


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
        if hasattr(self.weight, "ds_id"):  # ZeRO-3 takes it away after the layer, and again during its backward
            raise ValueError(_NEEDS_WHOLE_WEIGHT)
        device_type, autocast = hidden.device.type, None
        if torch.is_autocast_enabled(device_type) and hidden.dtype != torch.float64:
            autocast = torch.get_autocast_dtype(device_type)
        # Views, because data parallelism looks for used parameters behind the outputs, and overlooks bare ones.
        weight, bias = (None if p is None else p.view_as(p) for p in (self.weight, self.bias))
        return DeferredLogits(hidden, weight, bias, *deferring[1:], autocast=autocast)


def check_output_layer_of(model: nn.Module) -> nn.Linear:
    """Returns the output layer of a model of transformers. Raises ValueError if its output cannot be deferred."""
    head = model.get_output_embeddings()
    # One that deferred before FSDP2 sharded it is of a class made from DeferringLinear.
    if not (type(head) is nn.Linear or isinstance(head, DeferringLinear)) or "forward" in vars(head):
        raise ValueError(
            f"the output layer of {type(model).__name__} must be a plain nn.Linear on one device for the chunked loss, "
            f"got {type(head).__name__}"
        )
    return head


@contextmanager
def deferring_layer(model: nn.Module) -> Iterator[nn.Linear]:
    """Inside the block the output layer of `model` can defer; one that FSDP2 shards inside can do so afterwards too.

    model: a causal language model of transformers, or one inside a PeftModel. Yields the layer. Raises ValueError as
    `check_output_layer_of`.
    """
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    head = check_output_layer_of(model)
    is_plain = type(head) is nn.Linear
    if is_plain:
        head.__class__ = DeferringLinear
    try:
        yield head
    finally:
        if is_plain and type(head) is DeferringLinear:
            head.__class__ = nn.Linear


@contextmanager
def deferred_logits(model: nn.Module) -> Iterator[None]:
    """Inside the block a forward of `model` in this thread, without labels, has `DeferredLogits` as its logits.

    model, and what is raised: as `deferring_layer`.
    """
    with deferring_layer(model) as head:
        head.defer(None, "torch")
        try:
            yield
        finally:
            head.resume()
