"""Attention of one rank: its own keys, and those of the ranks before it that its rows can still see.

Rows are counted from the first carried key on: c carried keys, then the n rows of the rank.
"""

from typing import Any, NamedTuple

import torch

from flash_dmattn import NEVER, Visibility, interval_attention, select_visible
from flash_dmattn.decode import select_survivors
from flash_dmattn_hf.config import Windows
from flash_dmattn_hf.parallel.context import Shard
from flash_dmattn_hf.parallel.exchange import exchange
from flash_dmattn_hf.parallel.soft import cut_shard, deviation_of, moments, shown_softly


class Keys(NamedTuple):
    """Keys of a layer, of every importance head.

    key, value: (B, k, Hi, D), each with its own D. importance: (B, Hi, k).
    row: (B, Hi, k) int32, of the whole sequence, -1 for no key.
    """

    key: torch.Tensor
    value: torch.Tensor
    importance: torch.Tensor
    row: torch.Tensor

    def take(self, index: torch.Tensor) -> "Keys":
        """Returns the keys with these indices (B, Hi, m)."""
        place = index.transpose(1, 2).unsqueeze(-1)
        states = (each.gather(1, place.expand(-1, -1, -1, each.shape[-1])) for each in (self.key, self.value))
        numbers = (number.gather(-1, index) for number in (self.importance, self.row))
        return Keys(*states, *numbers)


def attend_shard(
    shard: Shard,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    importance: torch.Tensor,
    windows: Windows,
    *,
    selection_temperature: torch.Tensor | None = None,
    selection_band: float | None = 1.5,
    **options: Any,
) -> torch.Tensor:
    """Attends the rows of one rank to their windows, as `dynamic_mask_attention` does with the whole sequence.

    query: (B, n, H, D). key, value: (B, n, Hkv, D). importance: (B, Hi, n). options: of `interval_attention`.
    Returns (B, n, H, D). Raises ValueError for a soft selection of packed documents, or of all keys.
    """
    num_heads, batch = importance.shape[1], query.shape[0]
    if num_heads < key.shape[2]:
        raise ValueError(
            f"context_parallel needs an importance of every kv head, got {num_heads} for {key.shape[2]} heads"
        )
    if num_heads != key.shape[2]:  # every query head keeps its own keys
        key, value = (states.repeat_interleave(num_heads // key.shape[2], 2) for states in (key, value))
    rows = torch.arange(shard.first_row, shard.first_row + shard.num_rows, dtype=torch.int32, device=query.device)
    local = Keys(key, value, importance, rows.expand(batch, num_heads, -1))
    if selection_temperature is None:
        query, keys, _ = with_carried(shard, query, local, windows, windows.keep_window_size)
        shown, soft = windows, None
    else:
        shown = shown_softly(shard, windows, selection_band)
        most = max(shown.keep_window_size, windows.keep_window_size + 1)  # the best evicted key decides about the cut
        query, keys, spread = with_carried(shard, query, local, windows, most, moments(importance))
        death = visible_in_shard(shard, keys, windows._replace(sliding_window=None)).death
        soft = cut_shard(shard, keys.importance, keys.row, death, windows, selection_temperature, deviation_of(spread))
    return interval_attention(
        query,
        keys.key,
        keys.value,
        keys.importance,
        visible_in_shard(shard, keys, shown),
        soft=soft,
        max_visible=min(shown.keep_window_size, NEVER),
        **options,
    )


def with_carried(
    shard: Shard, query: torch.Tensor, local: Keys, windows: Windows, most: int, shared: torch.Tensor | None = None
) -> tuple[torch.Tensor, Keys, torch.Tensor | None]:
    """Exchanges what outlives the ranks, at most `most` keys of a head, and puts that of those before to local keys.

    The keys that outlive a rank are the survivors at the row after its last. Those of several ranks together hold the
    survivors of all their rows, because the K best of a whole are among the K best of its parts.

    shared: as in `exchange`. Returns query, the keys (in the order of their rows), and what all ranks have shared.
    """
    first, end = shard.first_row, shard.first_row + shard.num_rows
    first_begin, last_begin = shard.begins[:, 0], shard.begins[:, -1]
    is_of_last = shard.begins == last_begin[:, None]
    outgoing = local._replace(row=local.row.where(is_of_last[:, None], -1))
    sent = outgoing.take(_survivors(outgoing, last_begin, end, windows, most))
    query, received, shared = exchange(shard.context, query, sent, shared)
    if not shard.context.rank:
        return query, local, shared
    states = (part.transpose(0, 1).flatten(1, 2) for part in received[:2])
    numbers = (part.permute(1, 2, 0, 3).flatten(2) for part in received[2:])
    arrived = Keys(*states, *numbers)
    is_of_first = arrived.row >= first_begin[:, None, None]
    arrived = arrived._replace(row=arrived.row.where(is_of_first, -1))
    kept = _survivors(arrived, first_begin, first, windows, most)
    carried = arrived.take(kept.gather(-1, arrived.row.gather(-1, kept).argsort(-1)))
    states = (torch.cat(pair, 1) for pair in zip(carried[:2], local[:2], strict=True))
    numbers = (torch.cat(pair, -1) for pair in zip(carried[2:], local[2:], strict=True))
    return query, Keys(*states, *numbers), shared


def _survivors(keys: Keys, begin: torch.Tensor, next_row: int, windows: Windows, most: int) -> torch.Tensor:
    """Returns the indices (B, Hi, min(k, most)) of the keys that row next_row of a document may need, best first."""
    positions = (keys.row - begin[:, None, None]).where(keys.row >= 0, -1).int()
    # A cache may hold one key less, as the next token is local; here all messages have the size of the window.
    return select_survivors(
        keys.importance.detach(),
        positions,
        (next_row - begin).int(),
        keep_window_size=most + (windows.local_window_size > 0),
        num_sink_tokens=windows.num_sink_tokens,
        local_window_size=windows.local_window_size,
    )


def visible_in_shard(shard: Shard, keys: Keys, windows: Windows) -> Visibility:
    """Returns the intervals (B, Hi, c + n) of carried and local keys, in rows counted from the first carried key on."""
    selection = windows._asdict()
    num_carried = keys.row.shape[-1] - shard.num_rows
    if not num_carried and not shard.has_documents:
        return select_visible(keys.importance, **selection)
    begin = shard.begins[:, 0]
    row = keys.row
    if shard.has_documents:
        is_of_first = torch.nn.functional.pad(shard.begins == begin[:, None], (num_carried, 0), value=True)[:, None]
        row = row.where(is_of_first, -1)
    positions = (row - begin[:, None, None]).where(row >= 0, -1).int()
    shift = (begin - shard.first_row + num_carried)[:, None, None]
    birth, death = select_visible(keys.importance, positions=positions.contiguous(), **selection)
    birth, death = (birth + shift).clamp(min=0), (death + shift).clamp(0, NEVER).where(death < NEVER, NEVER)
    if shard.has_documents:
        death = torch.minimum(death, is_of_first.sum(-1, keepdim=True))
        birth = torch.minimum(birth, death)
        others = _visible_in_own_documents(shard, keys.importance[..., num_carried:], selection)
        birth, death = (
            torch.cat(
                [
                    bound[..., :num_carried],
                    bound[..., num_carried:].where(is_of_first[..., num_carried:], other + num_carried),
                ],
                -1,
            )
            for bound, other in zip((birth, death), others, strict=True)
        )
    return Visibility(birth.int(), death.int())


def _visible_in_own_documents(shard: Shard, importance: torch.Tensor, selection: dict[str, Any]) -> Visibility:
    """Returns the intervals (B, Hi, n) of the local keys, in rows of the rank, as if all documents began there."""
    batch, num_rows = shard.begins.shape
    starts = shard.begins[:, 1:] != shard.begins[:, :-1]
    starts = torch.nn.functional.pad(starts, (1, 0), value=True).flatten().nonzero().flatten()
    bounds = torch.nn.functional.pad(starts, (0, 1), value=batch * num_rows).int()
    one_row = importance.transpose(0, 1).reshape(1, importance.shape[1], batch * num_rows)
    found = select_visible(one_row, cu_seqlens=bounds, **selection)
    first = torch.arange(0, batch * num_rows, num_rows, device=importance.device)[:, None, None]
    return Visibility(*(bound.view(-1, batch, num_rows).transpose(0, 1) - first for bound in found))
