"""`flash_dmattn_func` over sequences of different lengths that stand one behind another."""

import torch

from flash_dmattn.arguments import accept_aliases
from flash_dmattn.attention import attend
from flash_dmattn.calls import AttentionCall
from flash_dmattn.dense.attention import dense_attention
from flash_dmattn.dense.functions import check_dropout, unpack
from flash_dmattn.dense.packed_sequences import PackedSequences


@accept_aliases(q="query", k="key", v="value", softmax_scale="scale")
def flash_dmattn_varlen_func(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    attn_bias: torch.Tensor | None = None,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    scale: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    deterministic: bool | None = None,
    return_attn_probs: bool | None = None,
    block_table: torch.Tensor | None = None,
    *,
    dropout_p: float = 0.0,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor, None]:
    """`flash_dmattn_func` over B sequences of different lengths; each attends to itself only.

    query: (total_q, H, D). key, value: (total_k, Hkv, D).
    attn_mask, attn_bias: as in `flash_dmattn_func` for the sequences filled up at the end, (1 or B, 1 or Hkv or H,
        1 or max_seqlen_q, 1 or max_seqlen_k); or (total_q, 1 or Hkv or H, max_seqlen_k), a row a query. Where they
        have a query dimension, query, key and value are copied into padded batches, with a mask of padding beside the
        caller's; where not, attention over intervals takes O(N).
    cu_seqlens_q, cu_seqlens_k: (B + 1,) int32, where the sequences start and end; cu_seqlens_k: None: cu_seqlens_q.
    max_seqlen_q, max_seqlen_k: at least the longest sequence; None: it is looked up.
    is_causal: the last query of a sequence sees all its keys, the one before it one less, and so on.
    block_table: None; keys in pages are refused.
    The other arguments as in `flash_dmattn_func`.

    Returns out (total_q, H, D), or with return_attn_probs (out, lse (H, total_q), None).
    Raises ValueError for arguments that do not fit, TypeError for an argument and its alias.
    """
    check_dropout(dropout_p)
    if block_table is not None:
        raise ValueError("block_table must be None, got a tensor: gather the pages into key and value first")
    is_causal, softcap, deterministic = bool(is_causal), softcap or 0.0, bool(deterministic)
    packed = PackedSequences(query, key, value, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softcap)
    attn_mask = packed.by_sequence("attn_mask", attn_mask)
    attn_bias = packed.by_sequence("attn_bias", attn_bias)
    if all(tensor is None or tensor.shape[2] == 1 for tensor in (attn_mask, attn_bias)):
        visibility, rows = packed.intervals(attn_mask, attn_bias, is_causal)
        call = AttentionCall.prepare(
            query[None],
            key[None],
            value[None],
            packed.importance(attn_mask, attn_bias),
            visibility,
            query_start=0 if packed.is_square else None,
            query_positions=None if packed.is_square else rows[None],
            # Not causal, a sequence shows its keys at once: rows can see the end of one and all of the next.
            max_visible=max(1, packed.max_seqlen_k * (1 if is_causal else 2)),
            softmax_scale=scale,
            softcap=softcap,
            deterministic=deterministic,
        )
        out, lse = attend(call, "auto")
        out, lse = out[0], lse[0]
    else:
        padded, padded_lse = dense_attention(
            packed.pad(query, packed.query_index),
            packed.pad(key, packed.key_index),
            packed.pad(value, packed.key_index),
            packed.padding_mask(attn_mask, is_causal),
            attn_bias,
            softmax_scale=scale,
            softcap=softcap,
            deterministic=deterministic,
        )
        out = packed.unpad(padded)
        lse = packed.unpad(padded_lse.transpose(1, 2)).transpose(0, 1)
    return (out, lse, None) if return_attn_probs else out


@accept_aliases(query="q", softmax_scale="scale")
def flash_dmattn_varlen_kvpacked_func(
    q: torch.Tensor,
    kv: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    attn_bias: torch.Tensor | None = None,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    scale: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    deterministic: bool | None = None,
    return_attn_probs: bool | None = None,
    *,
    dropout_p: float = 0.0,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor, None]:
    """`flash_dmattn_varlen_func` with key and value in one tensor. q: (total_q, H, D). kv: (total_k, 2, Hkv, D)."""
    key, value = unpack("kv", kv, 2, 1)
    return flash_dmattn_varlen_func(
        q,
        key,
        value,
        attn_mask,
        attn_bias,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        scale,
        is_causal,
        softcap,
        deterministic,
        return_attn_probs,
        dropout_p=dropout_p,
    )


@accept_aliases(softmax_scale="scale")
def flash_dmattn_varlen_qkvpacked_func(
    qkv: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    attn_bias: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    max_seqlen: int | None = None,
    scale: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    deterministic: bool | None = None,
    return_attn_probs: bool | None = None,
    *,
    dropout_p: float = 0.0,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor, None]:
    """`flash_dmattn_varlen_func` with query, key and value in one tensor. qkv: (total, 3, H, D)."""
    query, key, value = unpack("qkv", qkv, 3, 1)
    return flash_dmattn_varlen_func(
        query,
        key,
        value,
        attn_mask,
        attn_bias,
        cu_seqlens,
        cu_seqlens,
        max_seqlen,
        max_seqlen,
        scale,
        is_causal,
        softcap,
        deterministic,
        return_attn_probs,
        dropout_p=dropout_p,
    )
