"""The definition of attention under a mask and a bias in plain torch, on any device, one run of query rows at a time.

Everything is computed in float32, or float64 when given float64, also under autocast.
"""

import math
from collections.abc import Iterator

import torch

from flash_dmattn.calls import DenseCall

AUTOMATIC_ON = None  # every device; it refuses nothing

_MAX_LOGITS = 2**22  # logits that are alive at once, over batch and heads


def forward(call: DenseCall) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns out, lse and stats, as the operator does; lse and stats in float32 or float64."""
    with torch.autocast(call.query.device.type, enabled=False):
        batch, seqlen_q, num_heads, _ = call.query.shape
        out = torch.zeros_like(call.query, memory_format=torch.contiguous_format)
        lse = _compute(call.query.new_empty(batch, num_heads, seqlen_q)).fill_(-torch.inf)
        stats = torch.stack([-lse, torch.zeros_like(lse)])
        for rows in _runs(call):
            weights, highest, _ = _weights(call, rows)
            log_sum = -weights.amax(-1).masked_fill(highest == -torch.inf, 1).log()
            lse[:, :, rows] = highest + log_sum
            stats[0, :, :, rows] = highest.masked_fill(highest == -torch.inf, torch.inf) / math.log(2)
            stats[1, :, :, rows] = log_sum / math.log(2)
            out[:, rows] = (weights @ _heads(call, call.value)).transpose(1, 2).to(out.dtype)
        return out, lse, stats


def backward(
    call: DenseCall, out: torch.Tensor, stats: torch.Tensor, dout: torch.Tensor, dlse: torch.Tensor, needs_dbias: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Returns the gradients of query, key, value and, when needed, of attn_bias, in their dtypes and shapes."""
    with torch.autocast(call.query.device.type, enabled=False):
        dquery = torch.zeros_like(call.query, memory_format=torch.contiguous_format)
        key, value = _heads(call, call.key), _heads(call, call.value)
        dkey, dvalue = torch.zeros_like(key), torch.zeros_like(value)
        dbias = None
        if needs_dbias:
            dbias = _compute(torch.zeros_like(call.attn_bias, memory_format=torch.contiguous_format))
        for rows in _runs(call):
            weights, _, dcap = _weights(call, rows)
            run_query, run_dout, run_out = (_compute(x[:, rows]).transpose(1, 2) for x in (call.query, dout, out))
            delta = (run_dout * run_out).sum(-1, keepdim=True) - _compute(dlse[:, :, rows, None])
            dvalue += weights.transpose(-1, -2) @ run_dout
            dlogits = weights * (run_dout @ value.transpose(-1, -2) - delta)
            if needs_dbias:
                part = dbias if dbias.shape[2] == 1 else dbias[:, :, rows]
                part += sum_to_heads(dlogits, part.shape)
            dscores = dlogits * call.softmax_scale
            if dcap is not None:
                dscores *= dcap
            dquery[:, rows] = (dscores @ key).transpose(1, 2).to(dquery.dtype)
            dkey += dscores.transpose(-1, -2) @ run_query
        dkey, dvalue = (
            total.unflatten(1, (-1, call.group_size)).sum(2).transpose(1, 2).to(call.key.dtype).contiguous()
            for total in (dkey, dvalue)
        )
        return dquery, dkey, dvalue, dbias.to(call.attn_bias.dtype) if needs_dbias else None


def sum_to_heads(gradient: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """Sums (B, H, Sq, Sk) over what is broadcast from `shape`, whose second number is 1, Hkv or H."""
    num_heads = shape[1]
    if num_heads != gradient.shape[1]:
        gradient = gradient.unflatten(1, (num_heads, -1)).sum(2)
    return gradient.sum_to_size(shape)


def _runs(call: DenseCall) -> Iterator[slice]:
    batch, seqlen_q, num_heads, _ = call.query.shape
    if call.is_empty:
        return
    size = max(1, _MAX_LOGITS // (batch * num_heads * call.key.shape[1]))
    for start in range(0, seqlen_q, size):
        yield slice(start, min(start + size, seqlen_q))


def _weights(call: DenseCall, rows: slice) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Returns the softmax (B, H, T, Sk) of query rows, their highest logits (B, H, T) and the softcap's slope or None.

    A row that sees nothing has weights 0 and the highest logit -inf.
    """
    query = _compute(call.query[:, rows]).transpose(1, 2)
    logits = (query * call.softmax_scale) @ _heads(call, call.key).transpose(-1, -2)
    dcap = None
    if call.softcap > 0:
        capped = (logits / call.softcap).tanh()
        logits, dcap = capped * call.softcap, 1 - capped * capped
    num_heads, seqlen_k = logits.shape[1], logits.shape[3]
    if call.attn_bias is not None:
        bias = _compute(_of_rows(call.attn_bias, rows, num_heads))
        logits = logits + bias.masked_fill(bias.isnan(), -torch.inf).clamp(max=torch.finfo(torch.float32).max)
    if call.attn_mask is not None:
        logits = logits.masked_fill(_of_rows(call.attn_mask, rows, num_heads) == 0, -torch.inf)
    if call.is_causal:
        row = torch.arange(rows.start, rows.stop, device=logits.device) + seqlen_k - call.query.shape[1]
        is_future = torch.arange(seqlen_k, device=logits.device) > row[:, None]
        logits = logits.masked_fill(is_future, -torch.inf)
    highest = logits.amax(-1)
    weights = logits.softmax(-1).masked_fill(highest[..., None] == -torch.inf, 0)
    return weights, highest, dcap


def _of_rows(tensor: torch.Tensor, rows: slice, num_heads: int) -> torch.Tensor:
    """Returns the part of a mask or bias for query rows, its heads 1 or H."""
    tensor = tensor if tensor.shape[2] == 1 else tensor[:, :, rows]
    if tensor.shape[1] in (1, num_heads):
        return tensor
    return tensor.repeat_interleave(num_heads // tensor.shape[1], dim=1)


def _heads(call: DenseCall, tensor: torch.Tensor) -> torch.Tensor:
    """Lays key or value out as (B, H, Sk, D), repeated for the heads of a group."""
    return _compute(tensor).transpose(1, 2).repeat_interleave(call.group_size, dim=1)


def _compute(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()
