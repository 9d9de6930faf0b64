"""The definition of dynamic mask attention, written out plainly: slow, in float64, nothing clever."""

import math

import torch

NEVER = 2**31 - 1
FLOAT32_MAX = torch.finfo(torch.float32).max


def sees(t, j, positions, births, strengths, keep_window_size, num_sink_tokens, local_window_size, sliding_window):
    """Whether the query at position t sees key j of the keys with these positions, births and strengths.

    births: the position from which each key can be seen: its own, or in a block that of the block's first token.
    """
    p = positions[j]
    age = t - p
    if t < births[j]:
        return False
    if sliding_window is not None and age >= sliding_window:
        return False
    if p < num_sink_tokens:
        return True
    if age < local_window_size:
        return True
    num_better = 0
    for i in range(len(positions)):
        if num_sink_tokens <= positions[i] <= t - local_window_size:
            if (strengths[i], positions[i]) > (strengths[j], p):
                num_better += 1
    return num_better < keep_window_size - num_sink_tokens - local_window_size


def is_kept(j, positions, strengths, keep_window_size, num_sink_tokens):
    """Whether key j is visible to every query of its sequence when attention is not causal."""
    if positions[j] < num_sink_tokens:
        return True
    num_better = 0
    for i in range(len(positions)):
        if positions[i] >= num_sink_tokens:
            if (strengths[i], positions[i]) > (strengths[j], positions[j]):
                num_better += 1
    return num_better < keep_window_size - num_sink_tokens


def ranking_strengths(importance):
    """Importance as numbers to compare: NaN is -inf, +inf the float32 maximum; nested lists (B, Hi, Sk)."""
    exact = importance if importance.dtype == torch.float64 else importance.float()
    exact = torch.where(exact.isnan(), -math.inf, exact)
    return torch.where(exact == math.inf, FLOAT32_MAX, exact).tolist()


def sequences_of_row(seqlen, real, cu_seqlens):
    """Rows of the real tokens of each sequence in one batch row: one list per document."""
    bounds = [0, seqlen] if cu_seqlens is None else cu_seqlens.tolist()
    return [[row for row in range(start, end) if real[row]] for start, end in zip(bounds, bounds[1:], strict=False)]


def visible_keys(
    importance,
    *,
    keep_window_size,
    num_sink_tokens=0,
    local_window_size=0,
    sliding_window=None,
    is_causal=True,
    padding_mask=None,
    cu_seqlens=None,
    positions=None,
    blocks=None,
    queries=None,
):
    """Which keys each query sees: bool (B, Hi, T, Sk).

    Queries are the Sk rows of the key axis (padded ones see nothing); with `positions`, the true positions
    listed in `queries`. blocks: with start (B, Sk), the row at which the block of each real key begins.
    """
    batch, num_heads, seqlen = importance.shape
    strengths = ranking_strengths(importance)
    num_queries = seqlen if positions is None else len(queries)
    visible = torch.zeros(batch, num_heads, num_queries, seqlen, dtype=torch.bool)
    seen = []
    for b in range(batch):
        real = [True] * seqlen if padding_mask is None else padding_mask[b].tolist()
        for h in range(num_heads):
            if positions is None:
                sequences = [
                    (rows, list(range(len(rows))), list(enumerate(rows)))
                    for rows in sequences_of_row(seqlen, real, cu_seqlens)
                ]
            else:
                slots = positions[b, h].tolist()
                rows = [row for row in range(seqlen) if slots[row] >= 0 and real[row]]
                asked = [(t, index) for index, t in enumerate(queries)]
                sequences = [(rows, [slots[row] for row in rows], asked)]
            for rows, numbers, asked in sequences:
                own = [strengths[b][h][row] for row in rows]
                births = numbers if blocks is None else [rows.index(blocks.start[b, row]) for row in rows]
                for j, row in enumerate(rows):
                    for t, index in asked:
                        if is_causal:
                            options = (keep_window_size, num_sink_tokens, local_window_size, sliding_window)
                            found = sees(t, j, numbers, births, own, *options)
                        else:
                            found = is_kept(j, numbers, own, keep_window_size, num_sink_tokens)
                        if found:
                            seen.append((b, h, index, row))
    if seen:
        visible[tuple(torch.tensor(seen).T)] = True
    return visible


def inside_intervals(visibility, queries):
    """Which keys the intervals show to the queries at these rows or positions: bool (B, Hi, T, Sk)."""
    birth, death = (bound.long()[..., None, :] for bound in visibility)
    t = torch.as_tensor(queries, dtype=torch.int64)[..., :, None]
    if t.dim() == 3:  # (B, T, 1)
        t = t[:, None]
    return (birth <= t) & (t < death)


def attention(
    query,
    key,
    value,
    importance,
    visible,
    *,
    softmax_scale=None,
    softcap=0.0,
    add_importance_bias=True,
    keep_factor=None,
):
    """Attention over the visible keys, one query at a time: out (B, Sq, H, Dv) and lse (B, H, Sq), float64.

    query (B, Sq, H, D); key (B, Sk, Hkv, D); value (B, Sk, Hkv, Dv); importance (B, Hi, Sk); visible bool
    (B, Hi, Sq, Sk); keep_factor (B, H, Sq, Sk), what dropout multiplies the weights with, or None.
    """
    batch, seqlen_q, num_heads, head_dim = query.shape
    query, key, value, importance = (x.double() for x in (query, key, value, importance))
    scale = head_dim**-0.5 if softmax_scale is None else softmax_scale
    outs, lses = [], []
    for b in range(batch):
        for t in range(seqlen_q):
            for h in range(num_heads):
                h_kv = h * key.shape[2] // num_heads
                h_importance = h * importance.shape[1] // num_heads
                bias = importance[b, h_importance]
                seen = visible[b, h_importance, t]
                if add_importance_bias:
                    seen = seen & (bias > -math.inf)  # NaN too is left out
                index = seen.nonzero()[:, 0]
                if len(index) == 0:
                    outs.append(query.new_zeros(value.shape[3]))
                    lses.append(query.new_tensor(-math.inf))
                    continue
                logits = scale * (key[b, index, h_kv] @ query[b, t, h])
                if softcap:
                    logits = softcap * torch.tanh(logits / softcap)
                if add_importance_bias:
                    logits = logits + bias[index].clamp(max=FLOAT32_MAX)
                weights = torch.softmax(logits, 0)
                if keep_factor is not None:
                    weights = weights * keep_factor[b, h, t, index]
                outs.append(weights @ value[b, index, h_kv])
                largest = logits.max().detach()  # kept apart: beside a huge one the logarithm would be lost
                lses.append(largest + (logits - largest).exp().sum().log())
    shape = (batch, seqlen_q, num_heads)
    if not outs:
        return query.new_zeros(*shape, value.shape[3]), query.new_zeros(batch, num_heads, seqlen_q)
    return torch.stack(outs).view(*shape, value.shape[3]), torch.stack(lses).view(shape).transpose(1, 2)


SELECTION_OPTIONS = {
    "keep_window_size",
    "num_sink_tokens",
    "local_window_size",
    "sliding_window",
    "is_causal",
    "padding_mask",
    "cu_seqlens",
    "blocks",
}


def dynamic_mask_attention(query, key, value, importance, **options):
    """Selection, then attention of the last Sq rows: out and lse, float64."""
    selection = {name: options.pop(name) for name in SELECTION_OPTIONS & options.keys()}
    visible = visible_keys(importance.detach(), **selection)
    seqlen_q, seqlen_k = query.shape[1], key.shape[1]
    visible = visible[:, :, seqlen_k - seqlen_q :]
    mask = selection.get("padding_mask")
    if mask is not None:
        visible = visible & mask[:, None, seqlen_k - seqlen_q :, None]
    return attention(query, key, value, importance, visible, **options)
