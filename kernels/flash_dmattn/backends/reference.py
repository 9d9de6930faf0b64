"""The reference backend: the definition in plain torch, on any device, in memory O(N) plus one tile.

Queries are cut into tiles. A tile gathers the keys that any of its queries sees (at most w + tile of them when the
intervals come from a top-w selection), attends to them with an elementwise mask, and is done; the backward walks
the same tiles again. Everything is computed in float32, or float64 when given float64, also under autocast.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from flash_dmattn.backends.reference_decode import decode  # noqa: F401
from flash_dmattn.calls import AttentionCall
from flash_dmattn.dropout import keeps
from flash_dmattn.visibility import SoftCut

AUTOMATIC_ON = None  # every device; it refuses nothing

_MAX_TILE = 256  # query rows
_MAX_LOGITS = 2**22  # logits of a tile, over batch and heads, that are alive at once


def forward(call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns out, lse and stats, as the operator does; lse and stats in float32 or float64."""
    with torch.autocast(call.query.device.type, enabled=False):
        batch, seqlen_q, num_heads, head_dim = call.query.shape
        out = torch.zeros_like(call.query, memory_format=torch.contiguous_format)
        lse = _compute(call.query.new_empty(batch, num_heads, seqlen_q)).fill_(-torch.inf)
        stats = torch.stack([-lse, torch.zeros_like(lse)])
        for tile in _tiles(call.with_comparable_importance()):
            weights, highest, _ = tile.weights()
            # The largest weight is 1 / sum(exp(logits - highest)).
            log_sum = -weights.amax(-1).masked_fill(highest == -torch.inf, 1).log()  # (B, Hi, G * T)
            lse[:, :, tile.rows] = (highest + log_sum).reshape(batch, num_heads, -1)
            tile_stats = torch.stack([highest.masked_fill(highest == -torch.inf, torch.inf), log_sum])
            stats[:, :, :, tile.rows] = tile_stats.reshape(2, batch, num_heads, -1) / math.log(2)
            out[:, tile.rows] = tile.ungroup(_matmul(tile.drop(weights), tile.value)).to(out.dtype)
        return out, lse, stats


def backward(
    call: AttentionCall, out: torch.Tensor, stats: torch.Tensor, dout: torch.Tensor, dlse: torch.Tensor
) -> tuple[torch.Tensor | None, ...]:
    """Returns a gradient for each of call.DIFFERENTIABLE, in its dtype, None for what the call does not have.

    out, stats: what `forward` returned. dout: (B, Sq, H, D). dlse: (B, H, Sq).
    """
    with torch.autocast(call.query.device.type, enabled=False):
        batch, seqlen_k, num_kv_heads, head_dim = call.key.shape
        heads = call.num_interval_heads
        dquery = torch.zeros_like(call.query, memory_format=torch.contiguous_format)
        # One row more than there are keys: the gathered tile's filler rows land there.
        dkey = _compute(call.key.new_empty(batch, heads, seqlen_k + 1, head_dim)).zero_()
        dvalue = torch.zeros_like(dkey)
        dimportance = torch.zeros_like(dkey[..., 0])
        dscore, dthreshold = torch.zeros_like(dimportance), dimportance.new_zeros(batch, heads, call.query.shape[1])
        for tile in _tiles(call.with_comparable_importance()):
            weights, _, dcap = tile.weights()
            tile_dout = tile.group(_compute(dout[:, tile.rows]))
            delta = (tile_dout * tile.group(_compute(out[:, tile.rows]))).sum(-1, keepdim=True)
            delta -= tile.group(_compute(dlse).transpose(1, 2)[:, tile.rows, :, None])
            tile.accumulate(dvalue, _matmul(tile.drop(weights).transpose(-1, -2), tile_dout))
            dlogits = tile.drop(tile_dout @ tile.value.transpose(-1, -2)).sub_(delta).mul_(weights)
            if not torch.isfinite(dlogits.sum()):
                dlogits.masked_fill_(weights == 0, 0)
            tile.accumulate(dimportance, dlogits.sum(-2))
            if tile.gate_slope is not None:
                dgate = dlogits.view(batch, heads, -1, *tile.gate_slope.shape[2:]).sum(2) * tile.gate_slope
                tile.accumulate(dscore, dgate.sum(-2))
                dthreshold[:, :, tile.rows] = -dgate.sum(-1)
            dscores = dlogits.mul_(call.softmax_scale)
            if dcap is not None:
                dscores = torch.where(weights == 0, 0, dscores.mul_(dcap))
            tile.accumulate(dkey, _matmul(dscores.transpose(-1, -2), tile.query))
            dquery[:, tile.rows] = tile.ungroup(_matmul(dscores, tile.key)).to(dquery.dtype)
        return (
            dquery,
            _sum_to_kv_heads(dkey, call),
            _sum_to_kv_heads(dvalue, call),
            call.finish_dimportance(dimportance[..., :-1]),
            None if call.soft is None else dscore[..., :-1].contiguous(),
            None if call.soft is None else dthreshold,
        )


@dataclass(frozen=True)
class _Tile:
    """A run of query rows with the keys that they see.

    rows: the queries, a slice of Sq (T of them). query: (B, Hi, G * T, D). key, value: (B, Hi, L, D).
    mask_bias: (B, Hi, T, L), the importance and the soft gate where a query sees a key, -inf elsewhere.
    gate_slope: (B, Hi, T, L), d gate / d score, 0 where nothing is gated; None without a soft cut.
    keep_factor: (B, Hi, G * T, L), 0 where dropout drops a weight, 1 / (1 - dropout_p) elsewhere; None without dropout.
    index: (B, Hi, L), the keys; Sk stands for filler.
    """

    call: AttentionCall
    rows: slice
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    mask_bias: torch.Tensor
    gate_slope: torch.Tensor | None
    keep_factor: torch.Tensor | None
    index: torch.Tensor

    def weights(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Returns the softmax (B, Hi, G * T, L), each row's highest logit (B, Hi, G * T), and the softcap's slope.

        A row that sees nothing has weights 0 and the highest logit -inf. The slope, d capped / d logit, is like the
        weights, or None without a softcap.
        """
        logits = (self.query * self.call.softmax_scale) @ self.key.transpose(-1, -2)
        dcap = None
        if self.call.softcap > 0:
            capped = logits.div_(self.call.softcap).tanh_()
            logits, dcap = capped * self.call.softcap, 1 - capped * capped
        batch, heads, num_rows, num_keys = self.mask_bias.shape
        grouped = logits.view(batch, heads, -1, num_rows, num_keys)
        if torch.isfinite(logits.sum()):
            grouped += self.mask_bias[:, :, None]
        else:  # -inf does not hide NaN and +inf
            grouped += self.mask_bias.clamp(min=torch.finfo(logits.dtype).min)[:, :, None]
            grouped.masked_fill_(self.mask_bias[:, :, None] == -torch.inf, -torch.inf)
        highest = logits.amax(-1)
        weights = logits.softmax(-1)
        is_empty = highest == -torch.inf
        if is_empty.any():
            weights.masked_fill_(is_empty[..., None], 0)
        return weights, highest, dcap

    def drop(self, weights: torch.Tensor) -> torch.Tensor:
        """Applies dropout to (B, Hi, G * T, L)."""
        return weights if self.keep_factor is None else weights * self.keep_factor

    def group(self, tensor: torch.Tensor) -> torch.Tensor:
        """Lays (B, T, H, D) out as (B, Hi, G * T, D)."""
        return _group(tensor, self.call.num_interval_heads)

    def ungroup(self, tensor: torch.Tensor) -> torch.Tensor:
        """Lays (B, Hi, G * T, D) out as (B, T, H, D)."""
        batch, heads, _, head_dim = tensor.shape
        num_rows = self.rows.stop - self.rows.start
        return tensor.view(batch, -1, num_rows, head_dim).transpose(1, 2)

    def accumulate(self, total: torch.Tensor, addend: torch.Tensor) -> None:
        """Adds per-key rows (B, Hi, L, ...) to `total` (B, Hi, Sk + 1, ...). A tile names every key once."""
        batch, heads = _head_indices(self.index)
        total[batch, heads, self.index] = total[batch, heads, self.index] + addend


def _tiles(call: AttentionCall) -> Iterator[_Tile]:
    """Yields the tiles that see anything."""
    batch, seqlen_q, num_heads, _ = call.query.shape
    seqlen_k = call.key.shape[1]
    if call.query.numel() == 0 or seqlen_k == 0:
        return
    rows = call.query_rows()
    tile_size = max(16, min(_MAX_TILE, _MAX_LOGITS // (batch * num_heads * min(seqlen_k, 4096))))
    birth, death = call.intervals()
    is_alive = birth < death
    if call.importance is not None:
        is_alive = is_alive & (call.importance > -torch.inf)
    for start in range(0, seqlen_q, tile_size):
        tile_rows = slice(start, min(start + tile_size, seqlen_q))
        row = rows[:, tile_rows]  # (B, T)
        first = row.masked_fill(row < 0, torch.iinfo(torch.int32).max).amin(-1)[:, None, None]
        last = row.amax(-1)[:, None, None]
        is_seen = is_alive & (birth <= last) & (death > first)
        num_keys = int(is_seen.sum(-1).max())
        if num_keys > 0:
            yield _gather(call, birth, death, tile_rows, row, is_seen, num_keys)


def _gather(
    call: AttentionCall,
    birth: torch.Tensor,
    death: torch.Tensor,
    rows: slice,
    row: torch.Tensor,
    is_seen: torch.Tensor,
    num_keys: int,
) -> _Tile:
    """Builds the tile of the query rows `rows`, whose row numbers are `row`, with the keys that `is_seen` marks."""
    seqlen_k, num_kv_heads = call.key.shape[1:3]
    index = _marked_indices(is_seen, num_keys)
    is_filler = index == seqlen_k
    batch, heads = _head_indices(index)
    source = index.masked_fill(is_filler, 0)
    kv_head = heads // (index.shape[1] // num_kv_heads)
    birth, death = birth[batch, heads, source], death[batch, heads, source]
    row = row[:, None, :, None]
    birth = birth.masked_fill(is_filler, torch.iinfo(torch.int32).max)
    is_visible = (birth[:, :, None] <= row) & (row < death[:, :, None]) & (row >= 0)
    query = _group(_compute(call.query[:, rows]), index.shape[1])
    bias = query.new_zeros(()) if call.importance is None else call.importance[batch, heads, source][:, :, None]
    mask_bias = torch.where(is_visible, bias.to(query.dtype), -torch.inf)
    gate_slope = None
    if call.soft is not None:
        gate, gate_slope = _soft_gate(call.soft, rows, row, index)
        mask_bias = mask_bias + gate.to(query.dtype)
    return _Tile(
        call=call,
        rows=rows,
        query=query,
        key=_compute(call.key[batch, source, kv_head]),
        value=_compute(call.value[batch, source, kv_head]),
        mask_bias=mask_bias,
        gate_slope=gate_slope,
        keep_factor=None if call.dropout_seed is None else _keep_factor(call, rows, index).to(query.dtype),
        index=index,
    )


def _keep_factor(call: AttentionCall, rows: slice, index: torch.Tensor) -> torch.Tensor:
    """Returns what dropout multiplies a tile's weights with, (B, Hi, G * T, L) float64. index: (B, Hi, L), the keys."""
    num_heads, device = call.query.shape[2], index.device
    head = torch.arange(num_heads, device=device).view(1, index.shape[1], -1, 1, 1)  # (1, Hi, G, 1, 1)
    query = torch.arange(rows.start, rows.stop, device=device)[:, None]
    key, seed = index[:, :, None, None], call.dropout_seed.view(-1, 1, 1, 1, 1)
    return keeps(seed, head, query, key, call.dropout_p).flatten(2, 3).double() / (1 - call.dropout_p)


def _soft_gate(soft: SoftCut, rows: slice, row: torch.Tensor, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns log sigmoid(score - threshold) and its slope for a tile's pairs, (B, Hi, T, L); 0 where none is gated.

    row: (B, 1, T, 1), the row numbers of the query rows `rows`. index: (B, Hi, L), the keys; Sk is filler.
    """
    batch, heads = _head_indices(index)
    source = index.clamp(max=soft.score.shape[-1] - 1)
    score = soft.score[batch, heads, source][:, :, None]
    threshold = soft.threshold[:, :, rows, None]
    is_gated = (row >= soft.contested_from[batch, heads, source][:, :, None]) & (threshold > -torch.inf)
    distance = torch.where(is_gated, score - torch.where(is_gated, threshold, 0), 0)
    gate = torch.nn.functional.logsigmoid(distance)
    return torch.where(is_gated, gate, 0), torch.where(is_gated, torch.sigmoid(-distance), 0)


def _marked_indices(is_marked: torch.Tensor, count: int) -> torch.Tensor:
    """Returns (B, Hi, count) int64, the places that are marked, in order, filled up with their number N."""
    batch, heads, length = is_marked.shape
    place = torch.where(is_marked, is_marked.cumsum(-1) - 1, count)
    index = torch.full((batch, heads, count + 1), length, device=is_marked.device)
    source = torch.arange(length, device=is_marked.device).expand(is_marked.shape)
    return index.scatter_(-1, place, source)[..., :count]


def _head_indices(index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns batch and head numbers that broadcast against `index` (B, Hi, L)."""
    batch = torch.arange(index.shape[0], device=index.device)[:, None, None]
    heads = torch.arange(index.shape[1], device=index.device)[None, :, None]
    return batch, heads


def _group(tensor: torch.Tensor, num_groups: int) -> torch.Tensor:
    batch, num_rows, num_heads, head_dim = tensor.shape
    tensor = tensor.transpose(1, 2).reshape(batch, num_groups, num_heads // num_groups, num_rows, head_dim)
    return tensor.flatten(2, 3)


def _sum_to_kv_heads(gradient: torch.Tensor, call: AttentionCall) -> torch.Tensor:
    """Turns (B, Hi, Sk + 1, D) into (B, Sk, Hkv, D) in key's dtype."""
    num_kv_heads = call.key.shape[2]
    gradient = gradient[:, :, :-1].unflatten(1, (num_kv_heads, -1)).sum(2)
    return gradient.transpose(1, 2).to(call.key.dtype).contiguous()


def _compute(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _matmul(weights: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Multiplies so that a weight of exactly zero cancels even NaN and inf: what is not seen does not count."""
    if torch.isfinite(rows.sum()):
        return weights @ rows
    is_finite = torch.isfinite(rows)
    product = weights @ torch.where(is_finite, rows, 0)

    def meets(these_weights: torch.Tensor, these_rows: torch.Tensor) -> torch.Tensor:
        return these_weights.to(rows.dtype) @ these_rows.to(rows.dtype) > 0

    up = meets(weights > 0, rows == torch.inf) | meets(weights < 0, rows == -torch.inf)
    down = meets(weights > 0, rows == -torch.inf) | meets(weights < 0, rows == torch.inf)
    is_nan = meets(weights != 0, rows.isnan()) | (up & down)
    product = product.masked_fill(up, torch.inf).masked_fill(down, -torch.inf)
    return product.masked_fill(is_nan, torch.nan)
