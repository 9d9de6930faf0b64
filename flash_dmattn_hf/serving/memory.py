"""How many requests fit into memory: known before the first one comes, because no request ever needs more."""

from collections.abc import Mapping
from typing import Any

import torch
from transformers.generation.continuous_batching.utils import get_device_and_memory_breakdown

from flash_dmattn_hf.serving.layers import ServedLayer

SPARE_ROWS = 16
"""Rows beyond those that requests can hold at once: there snapshots of prefixes can stay."""


def bytes_per_request(layers: Mapping[int, ServedLayer], dtype: torch.dtype) -> int:
    """Returns the bytes of one request of any length: its slots in all layers."""
    return sum(layer.bytes_per_request(dtype) for layer in layers.values())


def copied_bytes_per_request(layers: Mapping[int, ServedLayer], dtype: torch.dtype) -> int:
    """Returns the bytes that a step copies of one request: slots that layers without keys of their own read.

    Slots in 8 bits are copied once more, as what they stand for.
    """
    copied = [layer for layer in layers.values() if layer.is_shared]
    copied += [layer._replace(slot_dtype=None) for layer in copied if layer.slot_dtype is not None]
    return sum(layer.bytes_per_request(dtype) for layer in copied)


def workspace_bytes(
    layers: Mapping[int, ServedLayer], config: Any, dtype: torch.dtype, num_tokens: int, num_logits: int
) -> int:
    """Returns about what a forward of so many tokens needs while it runs, logits for `num_logits` of them included."""
    hidden, num_heads = config.hidden_size, config.num_attention_heads
    inner = getattr(config, "intermediate_size", None) or 4 * hidden
    if not isinstance(inner, int):  # of each layer
        inner = max(inner)
    most = max(
        num_tokens * (num_heads + 4 * layer.num_heads) * max(layer.head_dim, layer.value_dim)
        + (layer.windows.keep_window_size + num_tokens) * layer.num_heads * (layer.head_dim + layer.value_dim)
        for layer in layers.values()
    )
    activations = (num_tokens * (4 * hidden + 3 * inner) + most) * dtype.itemsize
    return activations + num_logits * config.vocab_size * (dtype.itemsize + 2 * torch.float32.itemsize)


def count_rows(
    row_bytes: int,
    workspace: int,
    *,
    share: float,
    num_rows: int | None,
    most: int,
    copied_bytes: int = 0,
    most_copied: int = 0,
    available: int | None = None,
) -> int:
    """Returns for how many requests there will be slots.

    row_bytes: of one request. workspace: of a forward. share: of the free memory, that all may take.
    copied_bytes: that a step adds to the workspace for each of its requests, which are `most_copied` at most.
    num_rows: what the user asks for, None: as many as fit, `most` at most. available: free bytes, None: look.
    Raises ValueError when not even one request fits, or fewer than the user asks for.
    """
    if available is None:
        _, total, reserved, allocated = get_device_and_memory_breakdown()
        available = total - max(reserved, allocated)
    free = max(0, int(available * share) - workspace)
    fitting = free // (row_bytes + copied_bytes)
    if fitting > most_copied:
        fitting = (free - most_copied * copied_bytes) // row_bytes
    if fitting < (num_rows or 1):
        workspace += min(num_rows or 1, most_copied) * copied_bytes
        raise ValueError(
            f"{num_rows or 1} request(s) of {row_bytes / 2**20:.1f} MiB and a forward of {workspace / 2**20:.1f} MiB "
            f"must fit into {share:.0%} of the {available / 2**20:.1f} MiB that are free, got room for {fitting}: "
            "lower max_batch_tokens, num_blocks or keep_window_size, or raise max_memory_percent"
        )
    return min(fitting, most) if num_rows is None else num_rows
