"""Context parallelism through accelerate: `ParallelismConfig(cp_size=...)` in an unmodified Trainer or Accelerator.

accelerate enters a context for every step, which cuts the inputs and replaces torch's attention by a ring. For our
models it enters `context_parallel` instead, and the inputs are cut into contiguous shards.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import nn
from transformers import Trainer

from flash_dmattn_hf.names import is_ours
from flash_dmattn_hf.parallel.context import check_whole, context_parallel


def wrap_prepare_cp(original: Callable) -> Callable:
    """Returns Accelerator._prepare_cp with our context for our models."""

    @functools.wraps(original)
    def prepare(self, *args):
        if not any(_uses_our_attention(arg) for arg in args):
            # A Trainer prepares the loader of an evaluation by itself: the context of its model stays.
            is_kept = getattr(getattr(self, "_cp_context", None), "func", None) is cut_buffers
            if is_kept and not any(isinstance(arg, nn.Module) for arg in args):
                return args
            return original(self, *args)
        self._cp_context = functools.partial(cut_buffers, self.torch_device_mesh["cp"].get_group())
        return args

    return prepare


def wrap_prepare_inputs(original: Callable) -> Callable:
    """Returns Trainer._prepare_context_parallel_inputs, which lets our models pass and refuses what ranks cannot share.

    It runs on the whole batch, so that all ranks raise the same error.
    """

    @functools.wraps(original)
    def prepare(self, model, inputs):
        settings = getattr(self.accelerator, "parallelism_config", None)
        if settings is None or not _uses_our_attention(model):
            return original(self, model, inputs)
        if getattr(settings, "sp_size", 1) > 1:
            raise ValueError(
                f"sp_size must be 1 with flash_dmattn, got {settings.sp_size}: DeepSpeed's sequence parallelism needs "
                "dense attention; use cp_size"
            )
        if not settings.cp_enabled:
            return original(self, model, inputs)
        check_whole(inputs, settings.cp_size)
        if inputs.get("cu_seq_lens_q") is not None and inputs.get("position_ids") is None:
            raise ValueError("cu_seq_lens_q must come with position_ids: with cp_size these say what is packed")
        inputs = {name: value for name, value in inputs.items() if name not in ("attention_mask", *_DOCUMENTS)}
        return original(self, _Nameless(), inputs)

    return prepare


_DOCUMENTS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
"""Arguments of packed batches that are for one process; position_ids say the same."""


class _Nameless:
    """Stands for a model whose attention implementation the Trainer cannot look at."""


@contextmanager
def cut_buffers(
    group: dist.ProcessGroup,
    *,
    buffers: Sequence[torch.Tensor] | None = None,
    buffer_seq_dims: Sequence[int] | None = None,
    no_restore_buffers: set[torch.Tensor] | None = None,
) -> Iterator[None]:
    """Enters `context_parallel(group)` with this rank's shards of tensors; the signature is that of torch's.

    buffers: tensors of the whole sequence, which hold their shard inside the block. buffer_seq_dims: which of their
    dimensions is the sequence. no_restore_buffers: those that keep the shard afterwards.
    Raises ValueError for a length that the ranks do not divide.
    """
    buffers, kept = list(buffers or ()), {id(buffer) for buffer in no_restore_buffers or ()}
    with context_parallel(group) as context:
        wholes = [buffer.detach().view(buffer.shape) for buffer in buffers]
        cuts = list(zip(buffers, wholes, buffer_seq_dims or (), strict=True))
        lengths = [whole.shape[dim] for _, whole, dim in cuts]
        if any(length % context.world_size for length in lengths):  # before any of them is cut
            raise ValueError(f"buffers must have lengths that {context.world_size} ranks divide, got {lengths}")
        for buffer, whole, dim in cuts:
            buffer.data = whole.chunk(context.world_size, dim)[context.rank].contiguous()
        try:
            yield
        finally:
            for buffer, whole in zip(buffers, wholes, strict=True):
                if id(buffer) not in kept:
                    buffer.data = whole


def _uses_our_attention(model: Any) -> bool:
    config = getattr(model, "config", None) if isinstance(model, nn.Module) else None
    if config is None or not hasattr(config, "get_text_config"):
        return False
    return is_ours(config.get_text_config()._attn_implementation)


PATCHES = [(Trainer, "_prepare_context_parallel_inputs", wrap_prepare_inputs)]
if hasattr(Accelerator, "_prepare_cp"):  # since accelerate 1.10
    PATCHES.append((Accelerator, "_prepare_cp", wrap_prepare_cp))
