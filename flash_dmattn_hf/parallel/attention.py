"""Attention of one rank: its own keys, and those of the ranks before it that its rows can still see.

Rows are counted from the first carried key on: c carried keys, then the n rows of the rank.
"""

from typing import Any, NamedTuple

import torch

from flash_dmattn import NEVER, Visibility, interval_attention, select_visible
from flash_dmattn.decode import select_survivors
from flash_dmattn_hf.config import Windows
from flash_dmattn_hf.parallel.context import Shard
from flash_dmattn_hf.parallel.exchange import Exchange
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
    shown, most, shared = windows, windows.keep_window_size, None
    if selection_temperature is not None:
        shown = shown_softly(shard, windows, selection_band)
        most = max(shown.keep_window_size, windows.keep_window_size + 1)  # the best evicted key decides about the cut
        shared = moments(importance)
    exchange = send_survivors(shard, local, windows, most, shared)
    # Keys and values are on their way while the rank selects, which takes importances and rows alone.
    carried = choose_carried(shard, exchange, windows, most)
    ranked = carried.before(local)
    visibility = visible_in_shard(shard, *ranked, shown)
    if selection_temperature is not None:
        death = visible_in_shard(shard, *ranked, windows._replace(sliding_window=None)).death
    query, keys = receive(exchange, carried, query, local)
    soft = None
    if selection_temperature is not None:
        spread = deviation_of(exchange.shared)
        soft = cut_shard(shard, keys.importance, keys.row, death, windows, selection_temperature, spread)
    return interval_attention(
        query,
        keys.key,
        keys.value,
        keys.importance,
        visibility,
        soft=soft,
        max_visible=min(shown.keep_window_size, NEVER),
        **options,
    )


class Carried(NamedTuple):
    """Which of the received keys outlive the ranks before this one, in the order of their rows.

    index: (B, Hi, c) int64, into the keys of all of these ranks together; importance: (B, Hi, c), without a gradient;
    row: (B, Hi, c) int32, -1 for no key. On the first rank c is 0.
    """

    index: torch.Tensor
    importance: torch.Tensor
    row: torch.Tensor

    def before(self, local: Keys) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns importance, without a gradient, and row of these keys and the local ones, (B, Hi, c + n)."""
        importance = torch.cat([self.importance, local.importance.detach()], -1)
        return importance, torch.cat([self.row, local.row], -1)


def send_survivors(
    shard: Shard, local: Keys, windows: Windows, most: int, shared: torch.Tensor | None = None
) -> Exchange:
    """Begins the exchange of what outlives the ranks, at most `most` keys of a head: the survivors at the row after.

    shared: as in `Exchange`.
    """
    last_begin = shard.begins[:, -1]
    is_of_last = shard.begins == last_begin[:, None]
    outgoing = local._replace(row=local.row.where(is_of_last[:, None], -1))
    end = shard.first_row + shard.num_rows
    sent = outgoing.take(_survivors(outgoing.importance, outgoing.row, last_begin, end, windows, most))
    return Exchange(shard.context, sent[:2], sent[2:], shared)


def choose_carried(shard: Shard, exchange: Exchange, windows: Windows, most: int) -> Carried:
    """Returns the survivors among the keys of the ranks before this one, at its first row.

    What the ranks have sent holds the survivors of all their rows, because the K best of a whole are among the K best
    of its parts.
    """
    importance, row = (part.permute(1, 2, 0, 3).flatten(2) for part in exchange.numbers)
    if not shard.context.rank:
        return Carried(row.long(), importance, row)
    first_begin = shard.begins[:, 0]
    row = row.where(row >= first_begin[:, None, None], -1)
    kept = _survivors(importance, row, first_begin, shard.first_row, windows, most)
    index = kept.gather(-1, row.gather(-1, kept).argsort(-1))
    return Carried(index, importance.gather(-1, index), row.gather(-1, index))


def receive(exchange: Exchange, carried: Carried, query: torch.Tensor, local: Keys) -> tuple[torch.Tensor, Keys]:
    """Waits for keys and values, and returns query, and the carried keys and the local ones."""
    query, (key, value, importance, row) = exchange.finish(query)
    if not carried.index.shape[-1]:
        return query, local
    states = (part.transpose(0, 1).flatten(1, 2) for part in (key, value))
    numbers = (part.permute(1, 2, 0, 3).flatten(2) for part in (importance, row))
    arrived = Keys(*states, *numbers).take(carried.index)._replace(row=carried.row)
    states = (torch.cat(pair, 1) for pair in zip(arrived[:2], local[:2], strict=True))
    numbers = (torch.cat(pair, -1) for pair in zip(arrived[2:], local[2:], strict=True))
    return query, Keys(*states, *numbers)


def _survivors(
    importance: torch.Tensor, row: torch.Tensor, begin: torch.Tensor, next_row: int, windows: Windows, most: int
) -> torch.Tensor:
    """Returns the indices (B, Hi, min(k, most)) of the keys that row next_row of a document may need, best first."""
    positions = (row - begin[:, None, None]).where(row >= 0, -1).int()
    # A cache may hold one key less, as the next token is local; here all messages have the size of the window.
    return select_survivors(
        importance.detach(),
        positions,
        (next_row - begin).int(),
        keep_window_size=most + (windows.local_window_size > 0),
        num_sink_tokens=windows.num_sink_tokens,
        local_window_size=windows.local_window_size,
    )


def visible_in_shard(shard: Shard, importance: torch.Tensor, row: torch.Tensor, windows: Windows) -> Visibility:
    """Returns the intervals (B, Hi, c + n) of carried and local keys, in rows counted from the first carried key on.

    Keys that were evicted before the rank's first row beat no key at any row of the rank. So what is here is selected
    as if it were the whole sequence: nothing but its rows from c on, those of the rank, is asked for.

    importance, row: (B, Hi, c + n), as in `Keys`, the carried keys first and in order.
    """
    num_carried = row.shape[-1] - shard.num_rows
    selection = windows._replace(sliding_window=None)._asdict()  # that window counts rows of the true sequence
    padding_mask = is_of_first = None
    if shard.has_documents:
        is_of_first = shard.begins == shard.begins[:, :1]
        padding_mask = torch.cat([row[:, 0, :num_carried] >= 0, is_of_first], 1)  # no head has more keys than another
    birth, death = select_visible(importance, padding_mask=padding_mask, **selection)
    if is_of_first is not None:
        death = death.minimum(num_carried + is_of_first.sum(1, dtype=torch.int32)[:, None, None])
        others = _visible_in_own_documents(shard, importance[..., num_carried:], selection)
        for bound, other in zip((birth, death), others, strict=True):
            local = bound[..., num_carried:]
            local.copy_(local.where(is_of_first[:, None], other + num_carried))
    if windows.sliding_window is not None:
        too_old = row.long() - shard.first_row + num_carried + windows.sliding_window
        death = death.minimum(too_old.clamp(0, NEVER).int())
    return Visibility(birth, death)


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
