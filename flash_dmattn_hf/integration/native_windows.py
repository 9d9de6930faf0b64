"""Attention of layers that keep their own sliding window or chunks: both count all tokens, padding between them too."""

import torch

from flash_dmattn import NEVER, Blocks, Visibility
from flash_dmattn.attention import attend
from flash_dmattn.blocks import check_size
from flash_dmattn.calls import AttentionCall
from flash_dmattn_hf.integration.documents import Documents
from flash_dmattn_hf.integration.mask_functions import MaskLimits


def attend_natively(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    documents: Documents | None,
    blocks: Blocks | None,
    limits: MaskLimits,
    *,
    softmax_scale: float | None,
    softcap: float,
    dropout_p: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attends within a sliding window, or within chunks, which begin at the first real token of a row or document.

    query: (B, H, T, D). key, value: (B, Hkv, S, D), the last S of all tokens, the queries the last T.
    attention_mask: (B, N) bool of all tokens, True for real ones; None: all are, and N = S. Not looked at if there are
        documents, which must not be padded where attention is chunked: ValueError.
    blocks: bidirectional blocks of all N tokens, or None; ValueError for one longer than the window.
    limits: one of them is set.
    softmax_scale, softcap, dropout_p: as in `interval_attention`. Returns out (B, T, H, D) and lse (B, H, T).
    """
    batch, _, seqlen_q, _ = query.shape
    if documents is None:
        rows, end = _rows_and_ends(key, attention_mask, limits)
    else:
        if documents.padding_mask is not None and limits.chunk_size is not None:
            raise ValueError("packed documents must not be padded where attention is chunked")
        query, key, value = (
            states.transpose(0, 1).reshape(1, states.shape[1], -1, states.shape[3]) for states in (query, key, value)
        )
        rows, end = _rows_and_ends_in_documents(documents, limits)
    birth, max_visible = torch.where(rows < 0, NEVER, rows), limits.chunk_size or limits.sliding_window
    if blocks is not None:
        check_size(blocks.size, key.shape[2], key.shape[2], 0, limits.sliding_window)
        birth = blocks.births(birth[:, None], end[:, None])[:, 0]
        max_visible += blocks.size - 1
    intervals = [bound[:, None, -key.shape[2] :].expand(-1, key.shape[1], -1) for bound in (birth, end)]
    call = AttentionCall.prepare(
        query.to(value.dtype).transpose(1, 2),
        key.to(value.dtype).transpose(1, 2),
        value.transpose(1, 2),
        None,
        Visibility(*intervals),
        # The rows follow each other, so a GPU need not make room for every key in every list; -1 marks padding.
        query_start=rows.shape[1] - query.shape[2],
        query_positions=rows[:, -query.shape[2] :],
        max_visible=max_visible,
        softmax_scale=softmax_scale,
        softcap=softcap,
        dropout_p=dropout_p,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )
    out, lse = attend(call, "auto")
    out = out.reshape(batch, seqlen_q, *out.shape[2:])
    return out, lse if documents is None else lse.view(-1, batch, seqlen_q).transpose(0, 1)


def _rows_and_ends(key, attention_mask, limits: MaskLimits) -> tuple[torch.Tensor, ...]:
    """Returns the row number of every token, -1 for padding, and the first that does not see it, both (B, N) int32."""
    batch, _, seqlen_k, _ = key.shape
    if attention_mask is None:
        attention_mask = torch.ones(1, 1, dtype=torch.bool, device=key.device).expand(batch, seqlen_k)
    rows = torch.arange(attention_mask.shape[1], dtype=torch.int32, device=key.device).expand(batch, -1)
    first = None  # of a window nobody asks for it, at every token
    if limits.chunk_size is not None:
        first = (attention_mask.cumsum(1) == 0).sum(1, keepdim=True, dtype=torch.int32)
    return torch.where(attention_mask, rows, -1), _ends(rows, first, limits)


def _rows_and_ends_in_documents(documents: Documents, limits: MaskLimits) -> tuple[torch.Tensor, ...]:
    """As `_rows_and_ends`, for the one row of all documents."""
    bounds = documents.bounds
    rows = torch.arange(int(bounds[-1]), dtype=torch.int32, device=bounds.device)
    number = torch.searchsorted(bounds, rows, right=True) - 1
    end = torch.minimum(_ends(rows, bounds[number], limits), bounds[number + 1])[None]
    rows = rows[None]
    return rows if documents.padding_mask is None else torch.where(documents.padding_mask, rows, -1), end


def _ends(rows: torch.Tensor, first: torch.Tensor | None, limits: MaskLimits) -> torch.Tensor:
    """Returns the rows at which windows end, or chunks that began at `first`."""
    if limits.chunk_size is None:
        window = limits.sliding_window
        return torch.where(rows > NEVER - window, NEVER, rows + window)
    return first + (rows - first).div(limits.chunk_size, rounding_mode="floor") * limits.chunk_size + limits.chunk_size
