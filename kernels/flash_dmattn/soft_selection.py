"""Soft selection: the cut of a top-K selection as a gate with a slope, so that training can move keys across it.

A key that is neither a sink nor inside the local window of row t is contested there. Of the contested keys the K most
important are kept. Between the best that is evicted and the worst that is kept lies the threshold theta_t, and with a
temperature the cut there becomes

    gate(t, j) = log sigmoid((importance_j - theta_t) / (temperature * sd)),

sd the standard deviation of the importance over the sequence. As the temperature falls the gate becomes the hard mask.
A key's rank can only get worse, so both keys at the cut follow from the rows at which keys die, without N x N anything:
the best evicted key is the best of those dead so far, and the worst kept one is the next kept key to die.
"""

import math

import torch

from flash_dmattn.ranking import comparable
from flash_dmattn.selection import select_visible
from flash_dmattn.visibility import SoftCut

_SMALLEST_DEVIATION = 1e-6


def num_visible(keep_window_size: int, num_sink_tokens: int, local_window_size: int, band: float) -> int:
    """Returns how many keys a row of a soft selection sees at most: sinks, local window, ceil(band * K) others."""
    exempt = num_sink_tokens + local_window_size
    # Rounded, because 1.1 * 10 is above 11 in floating point.
    return exempt + math.ceil(round(band * (keep_window_size - exempt), 6))


def cut_softly(
    importance: torch.Tensor,
    temperature: float | torch.Tensor,
    seqlen_q: int,
    keep_window_size: int,
    num_sink_tokens: int,
    local_window_size: int,
    padding_mask: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
) -> SoftCut:
    """Returns the gate of a causal top-K selection for the last seqlen_q rows.

    importance: (B, Hi, Sk) floating point. temperature: in standard deviations of the importance, above 0.
    The other arguments as in `select_visible`.
    """
    importance = comparable(importance)
    documents = _Documents(importance, padding_mask, cu_seqlens)
    selection = {"padding_mask": padding_mask, "cu_seqlens": cu_seqlens}
    windows = {"num_sink_tokens": num_sink_tokens, "local_window_size": local_window_size}
    detached = importance.detach()
    if num_sink_tokens + local_window_size > 0:
        exempt = num_sink_tokens + local_window_size
        contested_from = select_visible(detached, keep_window_size=exempt, **windows, **selection).death
    else:
        contested_from = documents.row.to(torch.int32).expand(importance.shape).contiguous()
    death = select_visible(detached, keep_window_size=keep_window_size, **windows, **selection).death
    has_kept_keys = keep_window_size > num_sink_tokens + local_window_size
    threshold = _thresholds(importance, contested_from, death, documents, has_kept_keys)
    mean, deviation = documents.moments(detached)
    scale = 1 / (temperature * deviation)
    # Less the mean, so that nothing is lost where the importance is large beside its spread.
    score = ((importance.to(scale.dtype) - mean) * scale).to(importance.dtype)
    threshold = ((threshold.to(scale.dtype) - mean) * scale).to(importance.dtype)
    return SoftCut(score, threshold[..., importance.shape[-1] - seqlen_q :].contiguous(), contested_from)


class _Documents:
    """The sequences of a batch row: one, or several packed ones.

    row: (Sk,) int64. of_row: (Sk,) int64, the number of a row's document. end: (Sk,) int64, the row after its last.
    is_real: (B, 1, Sk) bool, which rows are no padding.
    """

    def __init__(self, importance: torch.Tensor, padding_mask: torch.Tensor | None, cu_seqlens: torch.Tensor | None):
        length, device = importance.shape[-1], importance.device
        self.row = torch.arange(length, device=device)
        if padding_mask is None:
            self.is_real = torch.ones((), dtype=torch.bool, device=device).expand(importance.shape[0], 1, length)
        else:
            self.is_real = padding_mask[:, None]
        if cu_seqlens is None:
            self.number, self.of_row, self.end = 1, torch.zeros_like(self.row), torch.full_like(self.row, length)
        else:
            self.number = cu_seqlens.numel() - 1
            bounds = cu_seqlens[1:].long().contiguous()
            self.of_row = torch.searchsorted(bounds, self.row, right=True).clamp(max=self.number - 1)
            self.end = bounds[self.of_row]

    def moments(self, importance: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns mean and standard deviation of each row's document, float64, (B, Hi, Sk), over finite importances."""
        counts = self.is_real & importance.isfinite()
        values = torch.where(counts, importance.double(), 0)
        total = self._sum(counts.double()).clamp(min=1)
        mean = self._sum(values) / total
        variance = self._sum(torch.where(counts, values - mean, 0).square()) / total
        return mean, variance.sqrt().clamp(min=_SMALLEST_DEVIATION)

    def _sum(self, values: torch.Tensor) -> torch.Tensor:
        """Sums (B, Hi, Sk) over documents; every row gets its document's sum."""
        if self.number == 1:
            return values.sum(-1, keepdim=True).expand(values.shape)
        sums = values.new_zeros(*values.shape[:-1], self.number).index_add_(-1, self.of_row, values)
        return sums[..., self.of_row]


def _thresholds(
    importance: torch.Tensor,
    contested_from: torch.Tensor,
    death: torch.Tensor,
    documents: _Documents,
    has_kept_keys: bool,
) -> torch.Tensor:
    """Returns theta (B, Hi, Sk) for every row: midway between the two keys at its cut, differentiably.

    -inf where nothing is evicted yet; the best evicted key alone where none is kept.
    """
    best_evicted, worst_kept = _keys_at_the_cut(importance.detach(), contested_from, death, documents)
    is_cut = documents.of_row[best_evicted.clamp(min=0)] == documents.of_row
    is_cut &= best_evicted >= 0
    threshold = importance.gather(-1, best_evicted.clamp(min=0))
    if has_kept_keys:
        threshold = threshold / 2 + importance.gather(-1, torch.where(is_cut, worst_kept, 0)) / 2
    return torch.where(is_cut, threshold, -torch.inf)


def _keys_at_the_cut(
    importance: torch.Tensor, contested_from: torch.Tensor, death: torch.Tensor, documents: _Documents
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns, for every row, the best key evicted so far and the worst one kept, (B, Hi, Sk) int64.

    Before the first eviction of its document a row gets a key of another document, or -1, and any key.
    """
    length = importance.shape[-1]
    # Numbers in the order of (document, importance, position), so that one running maximum serves all documents.
    order = importance.argsort(dim=-1, stable=True)
    order = order.gather(-1, documents.of_row[order].argsort(dim=-1, stable=True))
    row = documents.row.expand(order.shape)
    rank = torch.empty_like(order).scatter_(-1, order, row)

    end = documents.end
    is_contested = documents.is_real & (contested_from < end)
    # Two more columns: the end of the last document, and one for keys that have no place.
    place = torch.where(is_contested & (death < end), death.long(), length + 1)
    evicted = torch.full_like(rank, -1)
    evicted = torch.nn.functional.pad(evicted, (0, 2), value=-1).scatter_(-1, place, rank)
    best = evicted[..., :length].cummax(-1).values

    # A kept key is the worst until the row that takes it away; those alive at the end are taken away there.
    was_kept = is_contested & (death > contested_from)
    place = torch.where(was_kept, torch.minimum(death.long(), end), length + 1)
    taken = rank.new_full((*rank.shape[:-1], length + 2), length)
    taken.scatter_reduce_(-1, place, rank, "amin")
    worst = taken[..., 1 : length + 1].flip(-1).cummin(-1).values.flip(-1)
    best_key = torch.where(best >= 0, order.gather(-1, best.clamp(min=0)), -1)
    return best_key, order.gather(-1, worst.clamp(max=length - 1))
