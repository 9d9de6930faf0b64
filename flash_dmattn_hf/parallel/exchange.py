"""The exchanges between ranks: tensors of several dtypes as one message, differentiable, and counted."""

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


def exchange(
    context: Any, query: torch.Tensor, tensors: Sequence[torch.Tensor], shared: torch.Tensor | None = None
) -> tuple[torch.Tensor, list[torch.Tensor], torch.Tensor | None]:
    """Sends tensors to all ranks, as one message, and returns those of the ranks before this one.

    tensors: of any dtypes; their shapes are the same on all ranks. Each comes back as (rank, *shape). The gradient of
    what others have received returns to its owner. A rank whose own tensors nobody uses, or who receives nothing, has
    to take part in the backward as well: so the exchange hands on `query`, whose use is certain.
    shared: what comes back from all ranks, (world_size, *shape), without a gradient; or None.

    Returns query, the list of what was received, and what all have shared.
    """
    if shared is None:
        query, *received = _Exchange.apply(context, query, False, *tensors)
        return query, received, None
    query, *received, shared = _Exchange.apply(context, query, True, *tensors, shared)
    return query, received, shared


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx, context, query, is_last_shared, *tensors):
        ctx.context = context
        ctx.kinds = [(tensor.shape, tensor.dtype) for tensor in tensors]
        ctx.has_gradient = [tensor.is_floating_point() for tensor in tensors]
        ctx.set_materialize_grads(False)
        message = _pack([tensor[None] for tensor in tensors])[0]
        context.traffic.num_exchanges += 1
        context.traffic.num_bytes += message.numel()
        received = _unpack(gather_from_ranks(context, message), ctx.kinds)
        kept = len(received) - is_last_shared
        received = [tensor[: context.rank] for tensor in received[:kept]] + received[kept:]
        if is_last_shared:
            ctx.has_gradient[-1] = False
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
        return None, dquery, None, *(next(sums) if has else None for has in ctx.has_gradient)


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
