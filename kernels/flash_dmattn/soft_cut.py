"""The soft cut in torch: thresholds and scores of a soft selection, and their gradient.

A key's rank can only get worse, so both keys at the cut follow from the rows at which keys die, without N x N anything:
the best evicted key is the best of those dead so far, and the worst kept one is the next kept key to die.
"""

import torch

from flash_dmattn.calls import CutCall
from flash_dmattn.ranking import comparable
from flash_dmattn.visibility import NEVER

_SMALLEST_DEVIATION = 1e-6


def cut(call: CutCall) -> tuple[torch.Tensor, ...]:
    """Returns score, threshold, contested_from, cut and scale, as the operator does."""
    importance = comparable(call.importance)
    documents = _Documents(call)
    contested_from = documents.contested_from(call)
    best_evicted, worst_kept = _keys_at_the_cut(importance, contested_from, call.death, documents)
    is_cut = (best_evicted >= 0) & (documents.of_row[best_evicted] == documents.of_row)
    threshold = importance.gather(-1, best_evicted.clamp(min=0))
    if call.has_kept_keys:
        threshold = threshold / 2 + importance.gather(-1, worst_kept) / 2
    is_gated = is_cut & (threshold > -torch.inf)
    threshold = torch.where(is_gated, threshold, -torch.inf)

    mean, deviation = documents.moments(importance)
    scale = 1 / ((call.fixed_temperature if call.temperature is None else call.temperature) * deviation)
    # Less the mean, so that nothing is lost where the importance is large beside its spread.
    score, threshold = (
        ((number.double() - documents.to_rows(mean)) * documents.to_rows(scale)).to(importance.dtype)
        for number in (importance, threshold)
    )
    first_row = importance.shape[-1] - call.seqlen_q
    keys = torch.stack([best_evicted, worst_kept if call.has_kept_keys else torch.full_like(worst_kept, -1)])
    keys = torch.where(is_gated, keys, -1)[..., first_row:].int().contiguous()
    return score, threshold[..., first_row:].contiguous(), contested_from, keys, scale


def cut_backward(
    call: CutCall, cut: torch.Tensor, scale: torch.Tensor, dscore: torch.Tensor, dthreshold: torch.Tensor
) -> torch.Tensor:
    """Returns dimportance (B, Hi, Sk), in importance's dtype; arguments as the operator's."""
    scale = _Documents(call).to_rows(scale).expand(dscore.shape)
    dimportance = dscore * scale
    dthreshold = dthreshold * scale[..., dscore.shape[-1] - call.seqlen_q :]
    if call.has_kept_keys:
        dthreshold = dthreshold / 2
    for key in cut:
        dimportance.scatter_add_(-1, key.clamp(min=0).long(), torch.where(key >= 0, dthreshold, 0))
    return torch.where(call.importance.isfinite(), dimportance, 0).to(call.importance.dtype)


class _Documents:
    """The sequences of a batch row: one, or several packed ones.

    row: (Sk,) int64. of_row: (Sk,) int64, the number of a row's document. begin, end: (Sk,) int64, its first row, and
    the row after its last. is_real: (B, 1, Sk) bool, which rows are no padding.
    """

    def __init__(self, call: CutCall):
        batch, _, length = call.importance.shape
        device = call.importance.device
        self.number, self.row = call.num_documents, torch.arange(length, device=device)
        self.is_packed = call.cu_seqlens is not None
        if call.padding_mask is None:
            self.is_real = torch.ones((), dtype=torch.bool, device=device).expand(batch, 1, length)
        else:
            self.is_real = call.padding_mask[:, None]
        if self.is_packed:
            begins, ends = call.cu_seqlens[:-1].long(), call.cu_seqlens[1:].long()
            self.of_row = torch.searchsorted(ends, self.row, right=True).clamp(max=self.number - 1)
            self.begin, self.end = begins[self.of_row], ends[self.of_row]
        else:
            self.of_row = self.begin = torch.zeros_like(self.row)
            self.end = torch.full_like(self.row, length)

    def contested_from(self, call: CutCall) -> torch.Tensor:
        """Returns a copy of the call's contested_from, or what it stands for."""
        if call.contested_from is not None:
            return call.contested_from.clone()
        never = self.end if self.is_packed else torch.full_like(self.row, NEVER)
        is_sink = self.row - self.begin < call.num_sink_tokens
        contested_from = torch.where(is_sink, never, torch.minimum(self.row + call.local_window_size, never))
        return contested_from.int().expand(call.importance.shape).contiguous()

    def moments(self, importance: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns mean and standard deviation of each document, (B, Hi, docs) float64, over finite importances."""
        counts = self.is_real & importance.isfinite()
        values = torch.where(counts, importance.double(), 0)
        total = self._sum(counts.double()).clamp(min=1)
        mean = self._sum(values) / total
        variance = self._sum(torch.where(counts, values - self.to_rows(mean), 0).square()) / total
        return mean, variance.sqrt().clamp(min=_SMALLEST_DEVIATION)

    def to_rows(self, values: torch.Tensor) -> torch.Tensor:
        """Takes (B, Hi, docs) to (B, Hi, Sk), or to (B, Hi, 1) for one document."""
        return values if self.number == 1 else values[..., self.of_row]

    def _sum(self, values: torch.Tensor) -> torch.Tensor:
        """Sums (B, Hi, Sk) over documents, (B, Hi, docs)."""
        if self.number == 1:
            return values.sum(-1, keepdim=True)
        return values.new_zeros(*values.shape[:-1], self.number).index_add_(-1, self.of_row, values)


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
