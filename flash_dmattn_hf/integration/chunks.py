"""Chunked attention (llama4): a query sees the keys of its own chunk of the text, up to itself."""

from typing import Any

import torch

from flash_dmattn import NEVER, Visibility, interval_attention
from flash_dmattn_hf.integration.documents import Documents


def attend_chunks(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    documents: Documents | None,
    chunk_size: int,
    **options: Any,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attends within chunks, which begin at the first real token of a row or document.

    query: (B, H, T, D). key, value: (B, Hkv, S, D), the last S of all tokens, the queries the last T.
    attention_mask: (B, N) bool of all tokens, True for real ones; None: all are, and N = S. Not looked at if there are
        documents, which must not be padded: ValueError.
    options: of `interval_attention`. Returns out (B, T, H, D) and, if asked, lse (B, H, T).
    """
    batch, _, seqlen_q, _ = query.shape
    if documents is None:
        rows, end = _chunks_of_rows(key, attention_mask, chunk_size)
    else:
        if documents.padding_mask is not None:
            raise ValueError("packed documents must not be padded where attention is chunked")
        query, key, value = (
            states.transpose(0, 1).reshape(1, states.shape[1], -1, states.shape[3]) for states in (query, key, value)
        )
        rows, end = _chunks_of_documents(documents, chunk_size)
    birth = torch.where(rows < 0, NEVER, rows)
    intervals = [bound[:, None, -key.shape[2] :].expand(-1, key.shape[1], -1) for bound in (birth, end)]
    attended = interval_attention(
        query.to(value.dtype).transpose(1, 2),
        key.to(value.dtype).transpose(1, 2),
        value.transpose(1, 2),
        None,
        Visibility(*intervals),
        query_positions=rows[:, -query.shape[2] :],
        max_visible=chunk_size,
        deterministic=torch.are_deterministic_algorithms_enabled(),
        **options,
    )
    out, lse = attended if options["return_lse"] else (attended, None)
    out = out.reshape(batch, seqlen_q, *out.shape[2:])
    if not options["return_lse"]:
        return out
    return out, lse if documents is None else lse.view(-1, batch, seqlen_q).transpose(0, 1)


def _chunks_of_rows(key, attention_mask, chunk_size: int) -> tuple[torch.Tensor, ...]:
    """Returns the row number of every token, -1 for padding, and where its chunk ends, both (B, N) int32."""
    batch, _, seqlen_k, _ = key.shape
    if attention_mask is None:
        attention_mask = torch.ones(1, 1, dtype=torch.bool, device=key.device).expand(batch, seqlen_k)
    rows = torch.arange(attention_mask.shape[1], dtype=torch.int32, device=key.device).expand(batch, -1)
    first = (attention_mask.cumsum(1) == 0).sum(1, keepdim=True, dtype=torch.int32)
    start = first + (rows - first).div(chunk_size, rounding_mode="floor") * chunk_size
    return torch.where(attention_mask, rows, -1), start + chunk_size


def _chunks_of_documents(documents: Documents, chunk_size: int) -> tuple[torch.Tensor, ...]:
    """As `_chunks_of_rows`, for the one row of all documents."""
    bounds = documents.bounds
    rows = torch.arange(int(bounds[-1]), dtype=torch.int32, device=bounds.device)
    number = torch.searchsorted(bounds, rows, right=True) - 1
    first = bounds[number]
    start = first + (rows - first) // chunk_size * chunk_size
    return rows[None], torch.minimum(start + chunk_size, bounds[number + 1])[None]
