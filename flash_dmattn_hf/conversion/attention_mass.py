"""Dense causal attention that also reports how much attention each key receives from far away."""

import torch

QUERY_BLOCK = 128
"""Query rows whose logits exist at once: memory is O(QUERY_BLOCK x T), never T x T."""


def attention_and_mass(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    distance: int,
    softmax_scale: float,
    softcap: float | None = None,
    sliding_window: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One unpadded sequence, computed in float32.

    query: (H, T, D); key: (Hkv, T, D), value: (Hkv, T, Dv), heads of a group adjacent. distance: a query at t is far
    from key j when t - j >= distance. sliding_window: keys with t - j >= sliding_window are not attended.
    -> out (H, T, Dv) in query's dtype; mass (H, T) float32, the sum over the far queries of the
    attention probability of each key.
    """
    num_heads, length, head_dim = query.shape
    num_kv_heads = len(key)
    grouped = query.float().view(num_kv_heads, -1, length, head_dim)
    key, value = key.float(), value.float()
    out = grouped.new_empty(*grouped.shape[:3], value.shape[2])
    mass = torch.zeros(*grouped.shape[:3], dtype=torch.float32, device=query.device)
    positions = torch.arange(length, device=query.device)
    for start in range(0, length, QUERY_BLOCK):
        end = min(start + QUERY_BLOCK, length)
        first = 0 if sliding_window is None else max(0, start - sliding_window + 1)
        logits = grouped[:, :, start:end] @ key[:, None, first:end].mT
        logits *= softmax_scale
        if softcap:
            logits = softcap * torch.tanh(logits / softcap)
        age = positions[start:end, None] - positions[first:end]
        hidden = age < 0 if sliding_window is None else (age < 0) | (age >= sliding_window)
        probabilities = logits.masked_fill_(hidden, -torch.inf).softmax(-1)
        out[:, :, start:end] = probabilities @ value[:, None, first:end]
        last = end - distance
        if last > first:
            far = age[:, : last - first] >= distance
            mass[:, :, first:last] += (probabilities[..., : last - first] * far).sum(-2)
    return out.view(num_heads, length, -1).to(query.dtype), mass.view(num_heads, length)


def far_queries(
    length: int, distance: int, sliding_window: int | None = None, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """(T,) int64: how many queries of a sequence of `length` see each key from at least `distance` away."""
    last = torch.arange(length, device=device) + (length if sliding_window is None else sliding_window)
    return (last.clamp(max=length) - torch.arange(length, device=device) - distance).clamp(min=0)
