"""What a forward on several ranks knows of its sequence: found with its mask, and handed on with it.

It travels with the mask, because checkpointed layers are computed again later, perhaps in another thread.
"""

import functools
from typing import Any

import torch
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

from flash_dmattn_hf.config import Windows
from flash_dmattn_hf.integration.documents import has_documents, mark_documents
from flash_dmattn_hf.parallel.context import PADDING, ContextParallel, Shard, active
from flash_dmattn_hf.parallel.exchange import gather_from_ranks

SHARD = "_flash_dmattn_shard"
"""The attribute of a mask of `find_shard` that holds the `Shard`."""

_PROBLEMS = (
    "",
    "context_parallel needs position_ids (B, n) of the whole sequence, and a model that tells its mask about them, "
    "which no encoder does",
    "context_parallel does not support cached tokens: pass use_cache=False, and generate outside of it",
    PADDING,
)


@torch.compiler.disable
def find_shard(
    context: ContextParallel, position_ids: Any, mask: torch.Tensor | None, inputs_embeds: torch.Tensor, q_offset: Any
) -> torch.Tensor:
    """Returns a mask (B, n) int64 that carries the `Shard` of a forward: the row where each token's document begins.

    The ranks exchange their position_ids, so that a document ends where it would in one process. mask: (B, n) bool,
    or None. inputs_embeds: (B, n, hidden size). q_offset: the number of cached tokens.

    Raises ValueError on all ranks if one of them cannot take part, or if they differ in shape.
    """
    shape, device, problem = inputs_embeds.shape[:2], inputs_embeds.device, 0
    if not isinstance(position_ids, torch.Tensor) or position_ids.dim() != 2:
        problem = 1
    elif isinstance(q_offset, torch.Tensor) or q_offset:
        problem = 2
    elif mask is not None and not bool(mask.all()):
        problem = 3
    said = gather_from_ranks(context, torch.tensor([problem, *shape], device=device)).tolist()
    for rank, (problem, *_) in enumerate(said):
        if problem:
            raise ValueError(f"{_PROBLEMS[problem]} (rank {rank})")
    if any(other[1:] != said[0][1:] for other in said):
        shapes = [tuple(other[1:]) for other in said]
        raise ValueError(f"every rank of context_parallel must hold as many rows and tokens, got {shapes}")
    batch, num_rows = shape
    pieces = gather_from_ranks(context, position_ids.to(device, torch.int64).expand(batch, -1))
    numbers = mark_documents(pieces.transpose(0, 1).flatten(1))
    _refuse_own_positions(context, pieces)
    row = torch.arange(numbers.shape[1], device=numbers.device)
    starts = torch.ones_like(numbers, dtype=torch.bool)
    starts[:, 1:] = numbers[:, 1:] != numbers[:, :-1]
    begins = torch.where(starts, row, 0).cummax(-1).values
    first = context.rank * num_rows
    mask = begins[:, first : first + num_rows].contiguous()
    # Of the mask itself it would make a cycle, which keeps the group and its threads until Python collects garbage.
    setattr(mask, SHARD, Shard(context, mask.detach(), bool(has_documents(numbers))))
    return mask


def refuse_dense(config: Any) -> None:
    """Raises ValueError for a model inside a `context_parallel` block whose attention would see its own rows only."""
    raise ValueError(
        'context_parallel needs models with attn_implementation="flash_dmattn", got '
        f'"{getattr(config, "_attn_implementation", None)}", which would attend to the rows of its rank only'
    )


def check_shard(
    shard: Shard | None,
    key: torch.Tensor,
    cache_layer: Any,
    cu_seqlens: torch.Tensor | None,
    chunk_size: int | None,
) -> None:
    """Raises ValueError or RuntimeError for an attention call on several ranks that would attend to its own rows.

    shard: what the mask of the call carries. key: (B, Hkv, n, D). chunk_size: of a layer that attends within chunks.
    """
    if shard is None:
        raise RuntimeError(
            "the mask of this forward did not reach its attention function, which context_parallel needs: "
            "whatever moves or replaces the mask does not work with it"
        )
    if cache_layer is not None:
        raise ValueError(_PROBLEMS[2])
    if chunk_size is not None:
        raise ValueError("layers that attend within chunks are not supported inside context_parallel")
    if cu_seqlens is not None:
        raise ValueError("cu_seq_lens_q cannot be given inside context_parallel: its position_ids say what is packed")
    if key.shape[2] != shard.num_rows:
        raise ValueError(f"attention on several ranks must have {shard.num_rows} keys, got {key.shape[2]}")


def windows_of_shard(layer_idx: int, sliding_window: int | None) -> Windows:
    """Returns the windows of a layer without a gate whose keys are on several ranks: those of its sliding window.

    Raises ValueError if it has none.
    """
    if sliding_window is None:
        raise ValueError(
            f"layer {layer_idx} attends to all keys, which context_parallel does not exchange: give it dynamic "
            "masks or a sliding window"
        )
    return Windows(sliding_window, 0, sliding_window, sliding_window)


def wrap_loss_function(original: property) -> property:
    """Returns PreTrainedModel.loss_function; inside `context_parallel` one of next tokens needs shift_labels."""

    @functools.wraps(original.fget)
    def get(self):
        loss = original.fget(self)
        is_of_next_token = LOSS_MAPPING.get(getattr(self, "loss_type", None), ForCausalLMLoss) is ForCausalLMLoss
        if active.slot.content is None or not is_of_next_token:
            return loss
        return functools.wraps(loss)(functools.partial(_call_with_shift_labels, loss))

    return property(get, original.fset)


def _call_with_shift_labels(loss: Any, *args: Any, shift_labels: torch.Tensor | None = None, **kwargs: Any) -> Any:
    if shift_labels is None:
        raise ValueError(
            "labels must come with shift_labels inside context_parallel: the last target is on another rank"
        )
    return loss(*args, shift_labels=shift_labels, **kwargs)


def _refuse_own_positions(context: ContextParallel, pieces: torch.Tensor) -> None:
    """Raises ValueError if every rank counts from 0, as models do that are given no position_ids."""
    counted = torch.arange(pieces.shape[-1], device=pieces.device)
    if context.world_size > 1 and bool((pieces == counted).all()):
        raise ValueError(
            f"position_ids must be those of the whole sequence, got 0 to {pieces.shape[-1] - 1} on every rank: pass "
            "position_ids; documents as long as a shard need no context_parallel"
        )
