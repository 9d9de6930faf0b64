"""Checks of a mask and a bias: ValueErrors that name the argument, what came and what is needed."""

import torch

from flash_dmattn import arguments


def check_dense(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None,
    attn_bias: torch.Tensor | None,
    *,
    softcap: float,
    backend: str,
) -> None:
    """Raises ValueError unless query, key, value, attn_mask and attn_bias fit each other."""
    arguments.check_attention(query, key, value, None, softcap=softcap, backend=backend, allow_longer_query=True)
    batch, seqlen_q, num_heads, _ = query.shape
    seqlen_k, num_kv_heads = key.shape[1:3]
    sizes = [(1, batch), (1, num_kv_heads, num_heads), (1, seqlen_q), (1, seqlen_k)]
    for name, tensor in (("attn_mask", attn_mask), ("attn_bias", attn_bias)):
        if tensor is None:
            continue
        check_kind(name, tensor, query)
        if tensor.dim() != 4 or any(size not in allowed for size, allowed in zip(tensor.shape, sizes, strict=True)):
            wanted = ", ".join(" or ".join(map(str, dict.fromkeys(allowed))) for allowed in sizes)
            raise ValueError(f"{name} must have shape ({wanted}), got {tuple(tensor.shape)}")


def check_kind(name: str, tensor: torch.Tensor, query: torch.Tensor) -> None:
    """Raises ValueError unless `tensor` has a dtype that the argument `name` takes and is on query's device."""
    if not isinstance(tensor, torch.Tensor):
        raise ValueError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if not tensor.is_floating_point() and (name == "attn_bias" or tensor.dtype != torch.bool):
        kinds = "floating point" if name == "attn_bias" else "bool or floating point (0 hides)"
        raise ValueError(f"{name} must be {kinds}, got {tensor.dtype}")
    if tensor.device != query.device:
        raise ValueError(f"{name} must be on query's device {query.device}, got {tensor.device}")
    if name == "attn_mask" and tensor.requires_grad:
        raise ValueError("attn_mask must not require a gradient: there is none; use attn_bias")
