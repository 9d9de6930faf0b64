"""Masks of the top keys of each query, and back from a mask to intervals."""

import torch

from flash_dmattn.arguments import accept_aliases
from flash_dmattn.dense.tiled_mask import TiledMask, tile_mask
from flash_dmattn.selection import select_visible
from flash_dmattn.visibility import NEVER, Visibility

__all__ = ["TiledMask", "create_mask", "mask_to_visibility", "tile_mask"]


@accept_aliases(keep_window_size="window_size")
def create_mask(
    attention_bias: torch.Tensor,
    attention_mask: torch.Tensor | None,
    batch_size: int,
    query_len: int,
    key_len: int,
    window_size: int,
    min_dtype: float,
    block_size: int | None = None,
    *,
    is_causal: bool = True,
) -> torch.Tensor:
    """Marks, for every query, the `window_size` keys of its past with the highest bias; the newer key wins a tie.

    attention_bias: (1 or B, heads or 1, 1 or query_len, key_len) floating point. One that is the same for all queries
        is ranked once, in O(N), and still gives every query the top keys of its own past.
    attention_mask: bool, (B, key_len), (B, query_len) when older keys are all real, or broadcastable to the mask; True
        for keys that may be seen. None: all of them. What it hides takes no place among the top keys.
    batch_size, query_len, key_len: B, Sq and Sk; queries are the last Sq of the Sk positions.
    window_size: most keys that a query sees. Also named keep_window_size.
    min_dtype: keys whose bias is not above it are never seen.
    block_size: keys in blocks of so many are seen by a query if it would see more than half of them; None or 1: off.
    is_causal: False lets a query see what comes after it.

    Returns bool (B, heads, query_len, key_len), which takes O(N^2) memory: `dynamic_mask_attention` needs no mask.
    Raises ValueError for arguments that do not fit.
    """
    if attention_bias.dim() != 4 or attention_bias.shape[-1] != key_len:
        raise ValueError(
            f"attention_bias must have shape (B, heads, 1 or {query_len}, {key_len}), got {tuple(attention_bias.shape)}"
        )
    for name, size, least in (("window_size", window_size, 1), ("block_size", block_size or 1, 1)):
        if size < least:
            raise ValueError(f"{name} must be at least {least}, got {size}")
    bias = attention_bias.detach()
    allowed = bias > min_dtype
    if attention_mask is not None:
        allowed = allowed & _as_4d(attention_mask, batch_size, query_len, key_len)
    rows = torch.arange(key_len - query_len, key_len, device=bias.device)[:, None]
    columns = torch.arange(key_len, device=bias.device)
    is_past = columns <= rows if is_causal else torch.ones_like(columns, dtype=torch.bool)
    if allowed.shape[2] == 1:
        mask = _rank_once(bias, allowed, rows, window_size, is_causal) & allowed
    else:
        mask = _rank_rows(bias, allowed & is_past, window_size)
    if block_size is not None and block_size > 1:
        mask = _vote(mask, block_size) & allowed & is_past
    return mask.expand(batch_size, -1, query_len, -1).contiguous()


def mask_to_visibility(attn_mask: torch.Tensor) -> Visibility:
    """Turns a mask into intervals, if every key of it is seen by a run of consecutive queries, and by no other.

    Masks of causal top keys are such, when the ranking does not depend on the query; `interval_attention` takes what
    is returned in O(N).

    attn_mask: (B, Hi, Sq, Sk), bool or zero where a key is hidden; queries are the last Sq of the Sk positions.

    Returns birth and death, int32 (B, Hi, Sk), in rows of the key axis; death is `NEVER` where the last query sees the
    key, birth = death where none does.
    Raises ValueError naming the first key that is seen, lost and seen again.
    """
    if attn_mask.dim() != 4:
        raise ValueError(f"attn_mask must have shape (B, Hi, Sq, Sk), got {tuple(attn_mask.shape)}")
    visible = attn_mask != 0
    seqlen_q, seqlen_k = visible.shape[2:]
    if seqlen_q == 0 or visible.numel() == 0:
        zeros = torch.zeros(*visible.shape[:2], seqlen_k, dtype=torch.int32, device=visible.device)
        return Visibility(zeros, zeros.clone())
    count = visible.sum(2)
    first = visible.to(torch.uint8).argmax(2)  # the first of equal ones
    last = seqlen_q - 1 - visible.flip(2).to(torch.uint8).argmax(2)
    is_broken = (count > 0) & (last - first + 1 != count)
    if is_broken.any():
        batch, head, key = is_broken.nonzero()[0].tolist()
        run = visible[batch, head, :, key]
        lost = first[batch, head, key] + int((~run[first[batch, head, key] :]).to(torch.uint8).argmax())
        raise ValueError(
            f"attn_mask must show every key to consecutive queries, got key {key} of head {head} in batch row {batch}, "
            f"which queries {int(first[batch, head, key])} and {int(last[batch, head, key])} see and query {int(lost)} "
            "does not"
        )
    start = seqlen_k - seqlen_q
    birth = torch.where(count > 0, first + start, 0)
    death = torch.where(last == seqlen_q - 1, NEVER, last + 1 + start)
    return Visibility(birth.int(), torch.where(count > 0, death, 0).int())


def _rank_once(bias, allowed, rows, window_size, is_causal) -> torch.Tensor:
    """Returns (B, heads, Sq or 1, Sk), the top keys by intervals: what is not allowed ranks behind all others."""
    importance = bias[:, :, 0].masked_fill(~allowed[:, :, 0], -torch.inf)
    birth, death = select_visible(importance, keep_window_size=window_size, is_causal=is_causal)
    return (birth[:, :, None] <= rows) & (rows < death[:, :, None])


def _rank_rows(bias, allowed, window_size) -> torch.Tensor:
    """Returns (B, heads, Sq, Sk), the top keys of every row by itself."""
    ranked = bias.expand(allowed.shape).masked_fill(~allowed, -torch.inf)
    # Newest first and stable, because the newer key wins a tie.
    order = ranked.flip(-1).argsort(dim=-1, descending=True, stable=True)[..., :window_size]
    return torch.zeros_like(allowed).scatter_(-1, ranked.shape[-1] - 1 - order, True) & allowed


def _vote(mask: torch.Tensor, block_size: int) -> torch.Tensor:
    """Marks the blocks of keys of which more than half are marked; the last block may be shorter."""
    key_len = mask.shape[-1]
    blocks = torch.nn.functional.pad(mask, (0, -key_len % block_size)).unflatten(-1, (-1, block_size))
    sizes = torch.full((blocks.shape[-2],), block_size, device=mask.device)
    sizes[-1] = key_len - block_size * (len(sizes) - 1)
    kept = blocks.sum(-1) * 2 > sizes
    return kept.repeat_interleave(block_size, dim=-1)[..., :key_len]


def _as_4d(attention_mask: torch.Tensor, batch_size: int, query_len: int, key_len: int) -> torch.Tensor:
    """Lays a mask of two dimensions out as (B, 1, 1, Sk)."""
    attention_mask = attention_mask != 0
    if attention_mask.dim() == 4:
        return attention_mask
    shapes = {(batch_size, key_len), (batch_size, query_len)}
    if attention_mask.dim() != 2 or tuple(attention_mask.shape) not in shapes:
        raise ValueError(
            f"attention_mask must have shape ({batch_size}, {key_len}) or ({batch_size}, {query_len}) or four "
            f"dimensions, got {tuple(attention_mask.shape)}"
        )
    older = key_len - attention_mask.shape[1]
    return torch.nn.functional.pad(attention_mask, (older, 0), value=True)[:, None, None]
