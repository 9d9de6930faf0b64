"""The exchanges between ranks: tensors of several dtypes in one message, differentiable, and counted."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from flash_dmattn_hf.parallel.collectives import all_gather


@dataclass
class Traffic:
    """What one rank has sent: the number of its exchanges in forwards, and the bytes of its own part.

    gradient_bytes: what backwards have sent, to all other ranks together.
    """

    num_exchanges: int = 0
    num_bytes: int = 0
    gradient_bytes: int = 0


def gather_from_ranks(context: Any, tensor: torch.Tensor) -> torch.Tensor:
    """Returns the tensors of all ranks, (world_size, *shape); every rank gives one of the same shape and dtype."""
    gathered = tensor.new_empty((context.world_size, *tensor.shape))
    with context.watching():
        all_gather(gathered.view(-1), tensor.contiguous().view(-1), group=context.group)
    return gathered


class Exchange:
    """Sends tensors to all ranks, to get those of the ranks before this one: numbers at once, states in the background.

    What the numbers decide can be computed before `finish`, while the states travel. All ranks make the same exchanges,
    in the same order, with tensors of the same shapes.

    states, numbers: tensors of any dtypes. shared: what comes back from all ranks, without a gradient; or None.

    Of numbers and shared there is afterwards, without gradients, what was received: numbers, (rank, *shape) each, and
    shared (world_size, *shape), or None.
    """

    def __init__(
        self,
        context: Any,
        states: Sequence[torch.Tensor],
        numbers: Sequence[torch.Tensor],
        shared: torch.Tensor | None = None,
    ) -> None:
        self.context, self._sent = context, (*states, *numbers)
        first = [*numbers] if shared is None else [*numbers, shared]
        with torch.no_grad():
            received = self._unpacked(self._gather(first)[0], first)
            self._messages, self._work = self._gather(states, is_async=True)
        context.traffic.num_exchanges += 1
        self.shared = None if shared is None else received.pop()
        self.numbers = [tensor[: context.rank] for tensor in received]
        self._num_states = len(states)

    def finish(self, query: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Waits for the states. Returns query, and what was received, states and numbers, each (rank, *shape).

        The gradient of what others have received returns to its owner. A rank whose own tensors nobody uses, or who
        receives nothing, has to take part in the backward as well: so the exchange hands on `query`, whose use is
        certain.
        """
        query, *received = _Exchange.apply(self, query, *self._sent)
        return query, received

    def received(self) -> list[torch.Tensor]:
        """Waits, and returns what was received, without gradients."""
        with self.context.watching():
            self._work.wait()
        states = self._unpacked(self._messages, self._sent[: self._num_states])
        return [*(tensor[: self.context.rank] for tensor in states), *self.numbers]

    def _gather(self, tensors: Sequence[torch.Tensor], is_async: bool = False) -> tuple[torch.Tensor, Any]:
        message = _pack([tensor[None] for tensor in tensors])[0]
        self.context.traffic.num_bytes += message.numel()
        messages = message.new_empty((self.context.world_size, *message.shape))
        with self.context.watching():
            work = all_gather(messages.view(-1), message, group=self.context.group, async_op=is_async)
        return messages, work

    @staticmethod
    def _unpacked(messages: torch.Tensor, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        return _unpack(messages, [(tensor.shape, tensor.dtype) for tensor in tensors])


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx, exchange, query, *tensors):
        ctx.context = exchange.context
        ctx.kinds = [(tensor.shape, tensor.dtype) for tensor in tensors]
        ctx.has_gradient = [tensor.is_floating_point() for tensor in tensors]
        ctx.set_materialize_grads(False)
        received = exchange.received()
        without = [tensor for tensor, has in zip(received, ctx.has_gradient, strict=True) if not has]
        ctx.mark_non_differentiable(*without)
        return query.view_as(query), *received

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dquery, *gradients):
        context = ctx.context
        device = next(tensor for tensor in (dquery, *gradients) if tensor is not None).device
        kinds, parts = [], []
        for gradient, (shape, dtype), has in zip(gradients, ctx.kinds, ctx.has_gradient, strict=True):
            if has:
                kinds.append((shape, dtype))
                zeros = gradient is None
                parts.append(torch.zeros((context.rank, *shape), dtype=dtype, device=device) if zeros else gradient)
        returned = _unpack(_return_to_owners(context, _pack(parts)), kinds)
        sums = iter([part.sum(0, dtype=_precision(part.dtype)).to(part.dtype) for part in returned])
        return None, dquery, *(next(sums) if has else None for has in ctx.has_gradient)


def _return_to_owners(context: Any, messages: torch.Tensor) -> torch.Tensor:
    """Sends message i to rank i, for the ranks before this one, and returns those of the ranks after it.

    messages: (rank, bytes) uint8. Returns (world_size - rank - 1, bytes) uint8. The receiver adds them up, so that half
    precision has its sums in float32.
    """
    rank, world_size, size = context.rank, context.world_size, messages.shape[1]
    num_after = world_size - rank - 1
    returned = messages.new_empty((num_after, size))
    context.traffic.gradient_bytes += messages.numel()
    with context.watching():
        dist.all_to_all_single(
            returned.view(-1),
            messages.view(-1),
            output_split_sizes=[0] * (rank + 1) + [size] * num_after,
            input_split_sizes=[size] * rank + [0] * (world_size - rank),
            group=context.group,
        )
    return returned


def _pack(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Returns tensors (ranks, *shape) as the bytes of one message for each rank, (ranks, bytes) uint8."""
    return torch.cat([tensor.contiguous().flatten(1).view(torch.uint8) for tensor in tensors], 1)


def _unpack(messages: torch.Tensor, kinds: Sequence[tuple[torch.Size, torch.dtype]]) -> list[torch.Tensor]:
    """Undoes `_pack`, given shape and dtype of each tensor of one rank."""
    sizes = [shape.numel() * dtype.itemsize for shape, dtype in kinds]
    parts = zip(messages.split(sizes, 1), kinds, strict=True)
    # Cloned, because a dtype can only be viewed where the bytes are aligned.
    return [
        part.clone(memory_format=torch.contiguous_format).view(dtype).unflatten(1, shape)
        for part, (shape, dtype) in parts
    ]


def _precision(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
