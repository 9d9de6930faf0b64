"""The soft cut of a shard: its threshold starts where the ranks before end, its unit is the spread of all ranks."""

import torch

from flash_dmattn import NEVER, SoftCut
from flash_dmattn.ranking import comparable
from flash_dmattn.soft_selection import cut_softly, num_visible
from flash_dmattn_hf.config import Windows
from flash_dmattn_hf.parallel.context import Shard

_SMALLEST_DEVIATION = 1e-6  # as in flash_dmattn.soft_cut


def shown_softly(shard: Shard, windows: Windows, band: float | None) -> Windows:
    """Returns the windows within which a soft selection sees keys. Raises ValueError for what ranks cannot share."""
    if band is None:
        raise ValueError("soft_selection needs a band inside context_parallel, got None: all keys would be exchanged")
    if shard.has_documents:
        raise ValueError("soft_selection of packed documents is not supported inside context_parallel")
    return windows._replace(keep_window_size=num_visible(*windows[:3], band))


def moments(importance: torch.Tensor) -> torch.Tensor:
    """Returns number, mean and sum of squared distances from it of finite importances, (B, Hi, 3) float64."""
    importance = comparable(importance.detach())
    counts = importance.isfinite()
    number = counts.sum(-1).double()
    mean = importance.double().where(counts, 0).sum(-1) / number.clamp(min=1)
    distance = (importance.double() - mean[..., None]).where(counts, 0)
    return torch.stack([number, mean, distance.square().sum(-1)], -1)


def deviation_of(parts: torch.Tensor) -> torch.Tensor:
    """Returns the standard deviation (B, Hi) of all parts together, given the `moments` of each, (parts, B, Hi, 3)."""
    number, mean, squares = parts.unbind(-1)
    total = number.sum(0).clamp(min=1)
    distance = mean - (number * mean).sum(0) / total
    return ((squares + number * distance.square()).sum(0) / total).sqrt().clamp(min=_SMALLEST_DEVIATION)


def cut_shard(
    shard: Shard,
    importance: torch.Tensor,
    row: torch.Tensor,
    death: torch.Tensor,
    windows: Windows,
    temperature: torch.Tensor,
    deviation: torch.Tensor,
) -> SoftCut:
    """Returns the gate for the rows of a rank, in rows counted from the first carried key on.

    importance, row: (B, Hi, c + n), as in `Keys`, the carried keys first and in order. death: (B, Hi, c + n) int32, of
    the selection that is made soft. deviation: (B, Hi), of the importance of the whole sequence.
    """
    num_rows = shard.num_rows
    num_carried = row.shape[-1] - num_rows
    first, is_sink = shard.first_row, row < windows.num_sink_tokens  # an empty place, -1, as well
    contested_from = (row.long() - first + num_carried + windows.local_window_size).clamp(0, NEVER)
    contested_from = contested_from.masked_fill(is_sink, NEVER).int()
    importance = importance.masked_fill(row < 0, -torch.inf)
    competes, dies = _as_if_evicted_one_by_one(importance, contested_from, death, num_carried)
    found = cut_softly(importance, dies, temperature, num_rows, *windows[:3], contested_from=competes.contiguous())
    # The cut is in units of the spread of the keys that are here.
    unit = (deviation_of(moments(importance)[None]) / deviation)[..., None].to(found.score.dtype)
    return SoftCut(found.score * unit, found.threshold * unit, contested_from)


def _as_if_evicted_one_by_one(
    importance: torch.Tensor, contested_from: torch.Tensor, death: torch.Tensor, num_carried: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns contested_from and death with only the best of the keys that were evicted before the rank's first row.

    A cut has at most one eviction a row, and of those long past only the best matters, which dies in the row before.
    """
    if not num_carried:
        return contested_from, death
    carried = importance[..., :num_carried].detach()
    is_past = (death[..., :num_carried] < num_carried) & (contested_from[..., :num_carried] < NEVER)
    candidates = comparable(carried).masked_fill(~is_past, -torch.inf)
    is_best = is_past & (candidates == candidates.amax(-1, keepdim=True))
    place = torch.arange(1, num_carried + 1, device=importance.device).where(is_best, 0)
    is_best = is_best & (place == place.amax(-1, keepdim=True))  # the newest of equals
    contested_from, death = contested_from.clone(), death.clone()
    contested_from[..., :num_carried] = contested_from[..., :num_carried].masked_fill(is_past & ~is_best, NEVER)
    death[..., :num_carried] = death[..., :num_carried].masked_fill(is_best, num_carried - 1)
    return contested_from, death
