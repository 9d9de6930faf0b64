"""The definition of soft selection, written out plainly: slow, in float64, nothing clever."""

import math

import torch

from tests.core.definition import ranking_strengths, sequences_of_row, visible_keys


def cuts(importance, *, keep_window_size, num_sink_tokens=0, local_window_size=0, padding_mask=None, cu_seqlens=None):
    """Yields, for every row that has evicted a key, (b, h, document, row, contested, best evicted, worst kept key).

    document: its rows; contested: keys that compete at the row. The worst kept key is None where none is kept.
    """
    strengths = ranking_strengths(importance.detach())
    num_contested = keep_window_size - num_sink_tokens - local_window_size
    batch, num_heads, seqlen = importance.shape
    for b in range(batch):
        real = [True] * seqlen if padding_mask is None else padding_mask[b].tolist()
        for h in range(num_heads):
            for document in sequences_of_row(seqlen, real, cu_seqlens):
                for t, row in enumerate(document):
                    contested = [p for p in range(num_sink_tokens, t + 1) if t - p >= local_window_size]
                    best_first = sorted(contested, key=lambda p: (strengths[b][h][document[p]], p), reverse=True)
                    kept, evicted = best_first[:num_contested], best_first[num_contested:]
                    if evicted:
                        worst_kept = document[kept[-1]] if kept else None
                        yield b, h, document, row, [document[p] for p in contested], document[evicted[0]], worst_kept


def comparable(importance):
    largest = torch.finfo(torch.float32).max
    return torch.nan_to_num(importance.double(), nan=-math.inf, posinf=largest, neginf=-math.inf)


def threshold(values, best_evicted, worst_kept):
    """theta, given `comparable` importances of a head."""
    if worst_kept is None:
        return values[best_evicted]
    return values[worst_kept] / 2 + values[best_evicted] / 2


def mean_and_scale(values, document, temperature):
    """Of a document: what is subtracted from importances, and what they are then multiplied by."""
    finite = [x for x in values[document].tolist() if math.isfinite(x)]
    mean = sum(finite) / max(1, len(finite))
    deviation = math.sqrt(sum((x - mean) ** 2 for x in finite) / max(1, len(finite)))
    return mean, 1 / (temperature * max(deviation, 1e-6))


def gates(importance, temperature, **selection):
    """ln g for every row and key, (B, Hi, Sk, Sk) float64, differentiable in importance; 0 where nothing is gated."""
    values = comparable(importance)
    gate = torch.zeros(*values.shape, values.shape[-1], dtype=torch.float64)
    for b, h, document, row, contested, best_evicted, worst_kept in cuts(importance, **selection):
        theta = threshold(values[b, h], best_evicted, worst_kept)
        if theta > -math.inf:
            _, scale = mean_and_scale(values[b, h].detach(), document, temperature)
            gate[b, h, row, contested] = torch.nn.functional.logsigmoid((values[b, h, contested] - theta) * scale)
    return gate


def attention(query, key, value, importance, temperature, band, *, softmax_scale=None, softcap=0.0,
              add_importance_bias=True, sliding_window=None, blocks=None, **selection):  # fmt: skip
    """Soft dynamic mask attention of the last Sq rows, float64, differentiable: out (B, Sq, H, D), lse (B, H, Sq)."""
    exempt = selection.get("num_sink_tokens", 0) + selection.get("local_window_size", 0)
    num_contested = selection["keep_window_size"] - exempt
    seqlen_q, seqlen_k = query.shape[1], key.shape[1]
    shown = seqlen_k + exempt if band is None else exempt + math.ceil(band * num_contested - 1e-9)
    visible = visible_keys(
        importance.detach(),
        **{**selection, "keep_window_size": max(1, shown)},
        sliding_window=sliding_window,
        blocks=blocks,
    )[:, :, seqlen_k - seqlen_q :]
    if shown == 0:
        visible = torch.zeros_like(visible)
    if (padding_mask := selection.get("padding_mask")) is not None:
        visible = visible & padding_mask[:, None, seqlen_k - seqlen_q :, None]
    gate = gates(importance, temperature, **selection)[:, :, seqlen_k - seqlen_q :]

    group, group_kv = (query.shape[2] // heads for heads in (importance.shape[1], key.shape[2]))
    query, key, value = (x.double().transpose(1, 2) for x in (query, key, value))
    key, value = (x.repeat_interleave(group_kv, 1) for x in (key, value))
    logits = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale)
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    if add_importance_bias:
        bias = torch.nan_to_num(importance.double(), nan=-math.inf, posinf=torch.finfo(torch.float32).max,
                                neginf=-math.inf)  # fmt: skip
        logits = logits + bias.repeat_interleave(group, 1)[:, :, None]
    logits = logits + gate.repeat_interleave(group, 1)
    logits = logits.masked_fill(~visible.repeat_interleave(group, 1), -math.inf)
    is_empty = (logits == -math.inf).all(-1, keepdim=True)
    weights = logits.masked_fill(is_empty, 0).softmax(-1).masked_fill(is_empty, 0)
    lse = logits.masked_fill(is_empty, 0).logsumexp(-1).masked_fill(is_empty[..., 0], -math.inf)
    return (weights @ value).transpose(1, 2), lse
