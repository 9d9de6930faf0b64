"""Attention under a mask and a bias: over intervals where both depend on the key alone, dense otherwise."""

import torch

from flash_dmattn.attention import attend
from flash_dmattn.calls import AttentionCall, DenseCall
from flash_dmattn.dense.arguments import check_dense
from flash_dmattn.dense.ops import dense_attention_op
from flash_dmattn.dense.tiled_mask import TiledMask, without_expansion
from flash_dmattn.dispatch import DENSE_ATTENTION, check_backend_name, choose, differentiates_itself
from flash_dmattn.visibility import NEVER, Visibility

_LONGEST_UNCOUNTED = 16384


def dense_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | TiledMask | None = None,
    attn_bias: torch.Tensor | None = None,
    *,
    is_causal: bool = False,
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    deterministic: bool = False,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attends under any mask and any bias; neither is expanded or written down where it is broadcast.

    query: (B, Sq, H, D). key, value: (B, Sk, Hkv, D), query's dtype, all finite.
    attn_mask: (1 or B, 1 or Hkv or H, 1 or Sq, 1 or Sk), bool or floating point, zero hides a key; None hides nothing.
        Or a `TiledMask` of such a tensor.
    attn_bias: of such a shape, floating point, added to the logits; None adds nothing. NaN counts as -inf, +inf as the
        largest float32; a GPU adds 2.3e38 at most.
    is_causal: query i sees no key after i + Sk - Sq.

    A mask and a bias without a query dimension, up to Sq = Sk, take the O(N) memory and the time of attention over
    intervals.

    Returns out (B, Sq, H, D) and lse (B, H, Sq). A query that sees no key gets out 0, lse -inf and no gradient. The
    gradient of attn_bias is summed over what is broadcast.

    Raises ValueError for arguments that do not fit, RuntimeError when a backend asked for by name cannot serve.
    """
    tiles = None
    if isinstance(attn_mask, TiledMask):
        attn_mask.check(is_causal)
        attn_mask, tiles = attn_mask.attn_mask, attn_mask.tiles
    check_dense(query, key, value, attn_mask, attn_bias, softcap=softcap, backend=backend)
    check_backend_name(backend)
    attn_mask = without_expansion(attn_mask)
    if attn_bias is not None and not attn_bias.requires_grad:
        attn_bias = without_expansion(attn_bias)
    if query.shape[1] <= key.shape[1] and _is_per_key(attn_mask) and _is_per_key(attn_bias):
        visibility, max_visible = _intervals(query, key, attn_mask, attn_bias, is_causal)
        call = AttentionCall.prepare(
            query,
            key,
            value,
            _importance(query, key, attn_mask, attn_bias),
            visibility,
            query_start=key.shape[1] - query.shape[1],
            max_visible=max_visible,
            softmax_scale=softmax_scale,
            softcap=softcap,
            deterministic=deterministic,
        )
        return attend(call, backend)
    call = DenseCall(
        query=query,
        key=key,
        value=value,
        attn_mask=attn_mask,
        attn_bias=attn_bias,
        tiles=tiles,
        is_causal=is_causal,
        softmax_scale=query.shape[-1] ** -0.5 if softmax_scale is None else float(softmax_scale),
        softcap=float(softcap),
        deterministic=deterministic,
    )
    if differentiates_itself(backend):
        return choose(DENSE_ATTENTION, call, backend).attend(call)
    return dense_attention_op(*call.flatten(), backend)[:2]


def _is_per_key(tensor: torch.Tensor | None) -> bool:
    return tensor is None or tensor.shape[2] == 1


def _num_interval_heads(query, key, attn_mask, attn_bias) -> int:
    num_heads, num_kv_heads = query.shape[2], key.shape[2]
    heads = [tensor.shape[1] for tensor in (attn_mask, attn_bias) if tensor is not None]
    return num_heads if max(heads, default=1) > num_kv_heads else num_kv_heads


def _per_key(tensor: torch.Tensor, batch: int, heads: int, seqlen_k: int) -> torch.Tensor:
    """Lays (1 or B, ., 1, 1 or Sk) out as (B, heads, Sk)."""
    tensor = tensor[:, :, 0]
    if tensor.shape[1] not in (1, heads):
        tensor = tensor.repeat_interleave(heads // tensor.shape[1], dim=1)
    return tensor.expand(batch, heads, seqlen_k)


def _intervals(query, key, attn_mask, attn_bias, is_causal) -> tuple[Visibility | None, int | None]:
    """Returns who sees a key, None for everybody from its own row on, and how many keys a row sees at most."""
    batch, seqlen_k = key.shape[:2]
    if attn_mask is None and is_causal:
        return None, None
    heads = _num_interval_heads(query, key, attn_mask, attn_bias)
    rows = torch.arange(seqlen_k, dtype=torch.int32, device=key.device)
    birth = (rows if is_causal else torch.zeros_like(rows)).expand(batch, heads, seqlen_k)
    if attn_mask is None:
        return Visibility(birth, torch.full_like(birth, NEVER)), max(1, seqlen_k)
    visible = _per_key(attn_mask, batch, heads, seqlen_k) != 0
    return Visibility(birth, torch.where(visible, NEVER, birth)), _max_visible(visible)


def _max_visible(visible: torch.Tensor) -> int | None:
    """Returns a bound on how many keys of visible (B, heads, Sk) a row sees, or None where the backend is to count.

    Counting waits for the device, so it is left to sequences whose key lists would take more memory than key and value
    without it.
    """
    seqlen_k = visible.shape[-1]
    if seqlen_k <= _LONGEST_UNCOUNTED:
        return max(1, seqlen_k)
    if torch.compiler.is_compiling() or visible.numel() == 0 or visible.device.type == "meta":
        return None
    return max(1, int(visible.sum(-1).max()))


def _importance(query, key, attn_mask, attn_bias) -> torch.Tensor | None:
    if attn_bias is None:
        return None
    heads = _num_interval_heads(query, key, attn_mask, attn_bias)
    return _per_key(attn_bias, key.shape[0], heads, key.shape[1])
