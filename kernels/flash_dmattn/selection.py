"""Selection: from the importance of every key to the interval of queries that see it.

A key is evicted by the K-th key that beats it. Sorted by (importance, position), best first, the keys that beat
the q-th are the first q, so its eviction time is the K-th smallest position among them: one order statistic of a
prefix per key, and no N x N comparison anywhere.
"""

from types import ModuleType

import torch

from flash_dmattn import arguments
from flash_dmattn.aliases import accept_aliases
from flash_dmattn.dispatch import SELECTION, find
from flash_dmattn.order_statistics import kth_smallest_in_ranges
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
    birth, death = _select_visible_op(
        importance.detach(),
        min(keep_window_size, NEVER),
        min(num_sink_tokens, NEVER),
        min(local_window_size, NEVER),
        None if sliding_window is None else min(sliding_window, NEVER),
        is_causal,
        padding_mask,
        cu_seqlens,
        positions,
    )
    return Visibility(birth, death)


@torch.library.custom_op("flash_dmattn::select_visible", mutates_args=())
def _select_visible_op(
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
        axis = _PrunedAxis(importance, positions, padding_mask)
    elif padding_mask is None and cu_seqlens is None:
        axis = _PlainAxis(importance)
    else:
        if cu_seqlens is not None:
            arguments.check_cu_seqlens_values(cu_seqlens, importance.shape[-1])
        axis = _SegmentedAxis(importance, padding_mask, cu_seqlens)

    num_contested = keep_window_size - num_sink_tokens - local_window_size
    is_sink = axis.is_real & (axis.position < num_sink_tokens)
    competes = axis.is_real & (axis.position >= num_sink_tokens)
    if is_causal:
        evicted_at = _eviction_positions(axis, competes, num_contested)
        death = (evicted_at + local_window_size).masked_fill(is_sink, NEVER)
        if sliding_window is not None:
            death = torch.minimum(death, axis.position + sliding_window)
        return axis.intervals(death)
    order, start = _competition(axis, competes)
    places = torch.arange(order.shape[-1], device=order.device)
    rank = torch.empty_like(order).scatter_(-1, order, places - start)
    return axis.intervals_of_whole_sequence(is_sink | (competes & (rank < num_contested)))


def _competition(axis, competes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sorts the keys of every sequence, best first.

    Returns, for the sorted order, `order` (B, Hi, Sk), the key at each place, and `start` (B, Hi, Sk), the first
    place that belongs to the same sequence: a key that competes is beaten by those from `start` up to its own place.
    Keys that do not compete come last.
    """
    shape, length = axis.importance.shape, axis.importance.shape[-1]
    # The newest stands first, and every sort is stable: so it wins a tie.
    if isinstance(axis, _PlainAxis):
        # What does not compete, the sinks, is older than all that does: -inf puts it last.
        importance = torch.where(competes, axis.importance, -torch.inf)
        order = length - 1 - importance.flip(-1).argsort(dim=-1, descending=True, stable=True)
        return order, torch.zeros((), dtype=order.dtype, device=order.device).expand(shape)
    segment = torch.where(competes, axis.segment, axis.num_segments).expand(shape)
    order = length - 1 - _argsort_best_first(axis.importance.flip(-1), segment.flip(-1))
    if axis.num_segments == 1:
        return order, torch.zeros((), dtype=order.dtype, device=order.device).expand(shape)
    segment = segment.gather(-1, order)
    is_first = torch.ones_like(segment, dtype=torch.bool)
    is_first[..., 1:] = segment[..., 1:] != segment[..., :-1]
    places = torch.arange(length, device=order.device)
    return order, torch.where(is_first, places, 0).cummax(-1).values


def _argsort_best_first(importance: torch.Tensor, segment: torch.Tensor) -> torch.Tensor:
    """Sorts stably by segment, rising, then by importance, falling. Returns the indices, int64."""
    if importance.dtype == torch.float32:
        bits = importance.contiguous().view(torch.int32)
        ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)  # as integers in the order of the floats
        return ((segment << 32) - ordered).argsort(dim=-1, stable=True)
    order = importance.argsort(dim=-1, descending=True, stable=True)
    return order.gather(-1, segment.gather(-1, order).argsort(dim=-1, stable=True))


def _eviction_positions(axis, competes: torch.Tensor, num_contested: int) -> torch.Tensor:
    """Returns (B, Hi, Sk) int64, e_j: the first position >= p_j at which `num_contested` keys beat key j."""
    shape, length = axis.importance.shape, axis.importance.shape[-1]
    position = axis.position.expand(shape)
    if num_contested == 0:
        return position.clone()
    if length <= num_contested:
        return torch.full_like(position, NEVER)
    if isinstance(axis, _PrunedAxis):
        backend = find(SELECTION, axis.importance.device, axis.importance, None)
        if backend is not None:
            return _eviction_positions_of_backend(backend, axis, competes, num_contested)
    order, start = _competition(axis, competes)
    places = torch.arange(length, device=order.device).expand(shape)
    index = kth_smallest_in_ranges(
        order.flatten(0, 1), start.flatten(0, 1), places.flatten(0, 1), num_contested - 1
    ).view(shape)
    index = torch.maximum(index.clamp(max=length - 1), order)
    evicted_at = torch.where(places - start < num_contested, NEVER, position.gather(-1, index))
    return torch.empty_like(evicted_at).scatter_(-1, order, evicted_at)


def _eviction_positions_of_backend(
    backend: ModuleType, axis: "_PrunedAxis", competes: torch.Tensor, num_contested: int
) -> torch.Tensor:
    """Equals `_eviction_positions`. The backend takes every head as a batch row of competing keys and padding."""
    length = axis.importance.shape[-1]
    sequences = axis.importance.flatten(0, 1)[:, None]
    _, death = backend.select_visible(
        sequences,
        num_contested,
        num_sink_tokens=0,
        local_window_size=0,
        sliding_window=None,
        is_causal=True,
        padding_mask=competes.flatten(0, 1),
        cu_seqlens=None,
    )
    row = death.view(axis.importance.shape).long()
    return torch.where(row < length, axis.position.gather(-1, row.clamp(max=length - 1)), NEVER)


class _PlainAxis:
    """Keys that are one whole sequence in order: positions are row numbers."""

    num_segments = 1

    def __init__(self, importance: torch.Tensor):
        self.importance = importance
        self.position = torch.arange(importance.shape[-1], device=importance.device).expand(importance.shape)
        self.is_real = torch.ones((), dtype=torch.bool, device=importance.device).expand(importance.shape)

    def intervals(self, death: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return _as_int32(self.position, death)

    def intervals_of_whole_sequence(self, is_seen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return _as_int32(torch.where(is_seen, 0, self.position), torch.where(is_seen, NEVER, self.position))


class _SegmentedAxis:
    """Keys with padding between them, or of several packed documents: positions count a document's real tokens."""

    def __init__(self, importance: torch.Tensor, padding_mask: torch.Tensor | None, cu_seqlens: torch.Tensor | None):
        batch, _, length = importance.shape
        device = importance.device
        self.importance = importance
        self.length = length
        self.row = torch.arange(length, device=device)
        self.is_packed = cu_seqlens is not None
        if padding_mask is None:
            padding_mask = torch.ones(batch, length, dtype=torch.bool, device=device)
        if self.is_packed:
            bounds = cu_seqlens.long()
            document = torch.searchsorted(bounds[1:].contiguous(), self.row, right=True)
            document = document.clamp(max=bounds.numel() - 2)
        else:
            bounds = torch.tensor([0, length], device=device)
            document = torch.zeros_like(self.row)
        self.num_segments = bounds.numel() - 1
        real_before = torch.nn.functional.pad(padding_mask.long().cumsum(-1), (1, 0))  # (B, Sk + 1)
        first_real = real_before[:, bounds[document]]  # (B, Sk), real tokens before the document
        self.is_real = padding_mask[:, None]
        self.segment = document.expand(batch, 1, length)
        self.position = (real_before[:, :-1] - first_real)[:, None]
        self.first_real = first_real[:, None]
        self.num_real = (real_before[:, bounds[document + 1]] - first_real)[:, None]
        self.document_start, self.document_end = bounds[document], bounds[document + 1]
        self.real_rows = padding_mask.byte().argsort(dim=-1, descending=True, stable=True)  # real rows first

    def intervals(self, death: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        death = death.expand(self.importance.shape)
        is_inside = death < self.num_real
        index = torch.where(is_inside, self.first_real + death, 0)
        row = self.real_rows[:, None].expand(death.shape).gather(-1, index)
        beyond = self.document_end if self.is_packed else self.length + death - self.num_real
        beyond = torch.where(death >= NEVER, self._never(), beyond)
        death = torch.where(is_inside, row, beyond)
        return _as_int32(self.row.expand(death.shape), torch.where(self.is_real, death, self.row))

    def intervals_of_whole_sequence(self, is_seen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        birth = torch.where(is_seen, self.document_start, self.row)
        return _as_int32(birth, torch.where(is_seen, self._never(), self.row))

    def _never(self) -> torch.Tensor:
        return self.document_end if self.is_packed else torch.full_like(self.row, NEVER)


class _PrunedAxis:
    """A pruned set of keys in any order, with their true positions; sorted here, unsorted in the result."""

    num_segments = 1

    def __init__(self, importance: torch.Tensor, positions: torch.Tensor, padding_mask: torch.Tensor | None):
        positions = positions.long()
        if padding_mask is not None:
            positions = positions.masked_fill(~padding_mask[:, None], -1)
        order = torch.where(positions < 0, NEVER, positions).argsort(dim=-1, stable=True)
        self.order = order
        self.importance = importance.gather(-1, order)
        self.position = positions.gather(-1, order)
        self.is_real = self.position >= 0
        self.segment = torch.zeros_like(self.position)

    def intervals(self, death: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self._unsorted(self.position, torch.where(self.is_real, death, self.position))

    def intervals_of_whole_sequence(self, is_seen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self._unsorted(torch.where(is_seen, 0, self.position), torch.where(is_seen, NEVER, self.position))

    def _unsorted(self, birth: torch.Tensor, death: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        birth, death = _as_int32(birth, death)
        return (
            torch.empty_like(birth).scatter_(-1, self.order, birth),
            torch.empty_like(death).scatter_(-1, self.order, death),
        )


def _as_int32(birth: torch.Tensor, death: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return birth.clamp(max=NEVER).int().contiguous(), death.clamp(max=NEVER).int().contiguous()
