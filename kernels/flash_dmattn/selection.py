"""Selection: from the importance of every key to the interval of queries that see it.

A key is evicted by the K-th key that beats it: `flash_dmattn.competition` finds out when.
"""

import torch

from flash_dmattn import arguments
from flash_dmattn.arguments import accept_aliases
from flash_dmattn.axes import PrunedAxis, SegmentedAxis
from flash_dmattn.blocks import Blocks, check_blocks
from flash_dmattn.competition import eviction_positions, sort_competitors
from flash_dmattn.dispatch import SELECTION, find, is_eager
from flash_dmattn.ranking import comparable
from flash_dmattn.visibility import NEVER, Visibility


@accept_aliases(window_size="keep_window_size")
def select_visible(
    importance: torch.Tensor,
    *,
    keep_window_size: int,
    num_sink_tokens: int = 0,
    local_window_size: int = 0,
    sliding_window: int | None = None,
    is_causal: bool = True,
    padding_mask: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
    blocks: Blocks | None = None,
) -> Visibility:
    """Computes which queries see which key, as one interval of query rows per key.

    A query at position t sees the key at position p <= t if it is a sink (p < num_sink_tokens), if it is local
    (t - p < local_window_size), or if it is among the K = keep_window_size - num_sink_tokens - local_window_size
    most important of the other keys up to t - local_window_size; the newer key wins a tie. Positions count real
    tokens of the key's own sequence. The selection has no gradient.

    importance: (B, Hi, Sk) floating point; compared in float32, or float64 when given float64. -0.0 equals +0.0,
        NaN counts as -inf, +inf as the largest float32.
    keep_window_size: most keys that a query sees, at least 1.
    num_sink_tokens: leading tokens that every later query sees.
    local_window_size: newest tokens that a query always sees, itself included.
    sliding_window: keys this old or older are hidden as well (they still compete), or None.
    is_causal: when False every query sees the sinks and the most important keys of its whole sequence.
    padding_mask: (B, Sk) bool, True for real tokens, or None when all are real.
    cu_seqlens: (num_docs + 1,) int32, the document boundaries of a packed batch (B = 1), or None. On a GPU its
        values are trusted, because checking them would wait for the device.
    positions: (B, Hi, Sk) int32, the true positions of a pruned set of keys in any order, distinct, -1 for an
        empty slot; or None when the keys are the whole sequence in order.
    blocks: runs of tokens that see each other (`flash_dmattn.find_blocks`), or None. A query at t then sees such keys
        p > t, too, whose block begins at t or before. No block may be longer than local_window_size, unless
        Sk <= keep_window_size, nor than sliding_window.

    Returns birth and death, int32 (B, Hi, Sk), as row numbers of the key axis (as positions when `positions` is
    given): the key is visible to query rows birth <= t < death. `NEVER` stands for no death. A key that nobody
    sees has birth = death.

    Raises ValueError for an argument of the wrong shape, type, device or value.
    """
    arguments.check_selection(
        importance,
        keep_window_size=keep_window_size,
        num_sink_tokens=num_sink_tokens,
        local_window_size=local_window_size,
        sliding_window=sliding_window,
        is_causal=is_causal,
        padding_mask=padding_mask,
        cu_seqlens=cu_seqlens,
        positions=positions,
    )
    if blocks is not None:
        check_blocks(
            blocks,
            importance,
            keep_window_size=keep_window_size,
            local_window_size=local_window_size,
            sliding_window=sliding_window,
            is_causal=is_causal,
        )
    tensors = (padding_mask, cu_seqlens, positions)
    windows = clamp_windows(keep_window_size, num_sink_tokens, local_window_size, sliding_window)
    arguments_of_op = (importance.detach(), *windows, is_causal, *tensors)
    if is_eager(importance, *tensors):
        with torch.no_grad():
            birth, death = _select_visible(*arguments_of_op)
    else:
        birth, death = _select_visible_op(*arguments_of_op)
    return Visibility(birth if blocks is None else blocks.births(birth, death), death)


def clamp_windows(*sizes: int | None) -> tuple[int | None, ...]:
    """Returns sizes of windows that fit into 32 bits; a longer window holds no more keys."""
    return tuple([None if size is None else min(size, NEVER) for size in sizes])


def _select_visible(
    importance: torch.Tensor,
    keep_window_size: int,
    num_sink_tokens: int,
    local_window_size: int,
    sliding_window: int | None,
    is_causal: bool,
    padding_mask: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    positions: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    windows = (keep_window_size, num_sink_tokens, local_window_size, sliding_window)
    options = (*windows, is_causal, padding_mask, cu_seqlens)
    with torch.cuda.device_of(importance):  # a kernel runs on the current device, whatever its tensors are on
        backend = find(SELECTION, importance.device, importance, positions)
        if backend is not None:
            return backend.select_visible(importance, *options)
        return _select_in_torch(importance, *options, positions)


_select_visible_op = torch.library.custom_op("flash_dmattn::select_visible", _select_visible, mutates_args=())


@_select_visible_op.register_fake
def _(importance, *_):
    birth = torch.empty_like(importance, dtype=torch.int32, memory_format=torch.contiguous_format)
    return birth, torch.empty_like(birth)


def _select_in_torch(
    importance: torch.Tensor,
    keep_window_size: int,
    num_sink_tokens: int,
    local_window_size: int,
    sliding_window: int | None,
    is_causal: bool,
    padding_mask: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    positions: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    importance = comparable(importance)
    if positions is not None:
        axis = PrunedAxis(importance, positions, padding_mask)
    elif padding_mask is None and cu_seqlens is None:
        axis = _PlainAxis(importance)
    else:
        if cu_seqlens is not None:
            arguments.check_cu_seqlens_values(cu_seqlens, importance.shape[-1])
        axis = SegmentedAxis(importance, padding_mask, cu_seqlens)

    num_contested = keep_window_size - num_sink_tokens - local_window_size
    is_sink = axis.is_real & (axis.position < num_sink_tokens)
    competes = axis.is_real & (axis.position >= num_sink_tokens)
    if is_causal:
        evicted_at = eviction_positions(axis, competes, num_contested)
        death = (evicted_at + local_window_size).masked_fill(is_sink, NEVER)
        if sliding_window is not None:
            death = torch.minimum(death, axis.position + sliding_window)
        return _as_int32(*axis.intervals(death))
    order, start = sort_competitors(axis, competes)
    places = torch.arange(order.shape[-1], device=order.device)
    rank = torch.empty_like(order).scatter_(-1, order, places - start)
    return _as_int32(*axis.intervals_of_whole_sequence(is_sink | (competes & (rank < num_contested))))


def _as_int32(birth: torch.Tensor, death: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return birth.clamp(max=NEVER).int().contiguous(), death.clamp(max=NEVER).int().contiguous()


class _PlainAxis:
    """Keys that are one whole sequence in order: positions are row numbers. The other kinds stand in axes.py."""

    segment = None

    def __init__(self, importance: torch.Tensor):
        self.importance = importance
        self.position = torch.arange(importance.shape[-1], device=importance.device).expand(importance.shape)
        self.is_real = torch.ones((), dtype=torch.bool, device=importance.device).expand(importance.shape)

    def intervals(self, death: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.position, death

    def intervals_of_whole_sequence(self, is_seen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.where(is_seen, 0, self.position), torch.where(is_seen, NEVER, self.position)
