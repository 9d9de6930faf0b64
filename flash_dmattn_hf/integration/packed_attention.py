"""Attention within packed documents: where they lie in all batch rows, and their attention."""

from typing import Any

import torch

from flash_dmattn import dynamic_mask_attention
from flash_dmattn_hf.integration.documents import Documents, documents_of


def find_documents(
    query: torch.Tensor,
    key: torch.Tensor,
    attention_mask: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    cu_seqlens_k: torch.Tensor | None,
) -> Documents:
    """Returns the documents among the tokens of all batch rows.

    query: (B, H, S, D). key: (B, Hkv, S, D). cu_seqlens, cu_seqlens_k: (num_docs + 1,) integers, where the documents of
    one row begin and end; None: attention_mask (1 or B, S) int64 has their numbers, as `mark_documents` gives them.

    Raises ValueError for bounds of a batch or of cached tokens, for other bounds of the keys, and for missing numbers.
    """
    batch, _, seqlen_q, _ = query.shape
    if cu_seqlens is not None:
        if batch != 1 or seqlen_q != key.shape[2]:
            raise ValueError(
                "cu_seq_lens_q needs one packed row without cached tokens, got a batch of "
                f"{batch} with {seqlen_q} queries and {key.shape[2]} keys"
            )
        on_cpu = cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling()
        if cu_seqlens_k is not None and on_cpu and not torch.equal(cu_seqlens, cu_seqlens_k):
            raise ValueError(
                f"cu_seq_lens_k must equal cu_seq_lens_q, got {cu_seqlens_k.tolist()} and {cu_seqlens.tolist()}"
            )
        return Documents(cu_seqlens.to(torch.int32))
    numbers = attention_mask.expand(batch, -1)
    if numbers.shape[1] != key.shape[2] or seqlen_q != key.shape[2]:
        raise ValueError(f"packed position_ids must cover all {key.shape[2]} keys, got {numbers.shape[1]} positions")
    return documents_of(numbers)


def attend_packed(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    importance: torch.Tensor,
    documents: Documents,
    options: dict[str, Any],
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attends within documents: the whole batch becomes one row of documents.

    query: (B, H, S, D). key: (B, Hkv, S, D), value: (B, Hkv, S, Dv). importance: (B, Hi, S). options: of
    `dynamic_mask_attention`. Returns out (B, S, H, Dv) and, if asked, lse (B, H, S).
    """
    batch, _, seqlen, _ = query.shape

    def one_row(tensor):  # (B, H, S, D) -> (1, B * S, H, D)
        return tensor.transpose(1, 2).reshape(1, batch * seqlen, tensor.shape[1], tensor.shape[3])

    attended = dynamic_mask_attention(
        one_row(query),
        one_row(key),
        one_row(value),
        importance.transpose(0, 1).reshape(1, importance.shape[1], batch * seqlen),
        cu_seqlens=documents.bounds,
        padding_mask=documents.padding_mask,
        **options,
    )
    out, lse = attended if options["return_lse"] else (attended, None)
    out = out.reshape(batch, seqlen, *out.shape[2:])
    return out if lse is None else (out, lse.view(-1, batch, seqlen).transpose(0, 1))
