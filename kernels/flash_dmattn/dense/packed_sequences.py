"""Sequences of different lengths in one tensor: as intervals of rows, or filled up to a batch."""

from functools import cached_property

import torch

from flash_dmattn import arguments
from flash_dmattn.dense.arguments import check_kind
from flash_dmattn.visibility import Visibility


class PackedSequences:
    """B sequences, of queries and of keys, and where each row of them belongs."""

    def __init__(self, query, key, value, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softcap):
        cu_seqlens_k = cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k
        for name, tensor in (("query", query), ("key", key), ("value", value)):
            if not isinstance(tensor, torch.Tensor) or tensor.dim() != 3:
                got = tuple(tensor.shape) if isinstance(tensor, torch.Tensor) else type(tensor).__name__
                raise ValueError(f"{name} must have shape (total, heads, D), got {got}")
        arguments.check_attention(
            query[None], key[None], value[None], None, softcap=softcap, backend="auto", allow_longer_query=True
        )
        for name, bounds, rows in (("cu_seqlens_q", cu_seqlens_q, query), ("cu_seqlens_k", cu_seqlens_k, key)):
            arguments.check_cu_seqlens(bounds, 1, rows.device, name)
            arguments.check_cu_seqlens_values(bounds, rows.shape[0], name)
        if len(cu_seqlens_q) != len(cu_seqlens_k):
            raise ValueError(
                f"cu_seqlens_k must have as many sequences as cu_seqlens_q, got {len(cu_seqlens_k) - 1} against "
                f"{len(cu_seqlens_q) - 1}"
            )
        self.query, self.key = query, key
        self.query_bounds, self.key_bounds = cu_seqlens_q.long(), cu_seqlens_k.long()
        self.batch = len(cu_seqlens_q) - 1
        self.is_square = cu_seqlens_q is cu_seqlens_k or torch.equal(cu_seqlens_q, cu_seqlens_k)
        self.max_seqlen_q = _longest("max_seqlen_q", max_seqlen_q, self.query_bounds)
        self.max_seqlen_k = _longest("max_seqlen_k", max_seqlen_k, self.key_bounds)

    def by_sequence(self, name: str, tensor: torch.Tensor | None) -> torch.Tensor | None:
        """Returns a mask or bias as (1 or B, heads, 1 or max_seqlen_q, 1 or max_seqlen_k), rows of queries gathered."""
        num_heads, num_kv_heads = self.query.shape[1], self.key.shape[1]
        if tensor is None:
            return None
        check_kind(name, tensor, self.query)
        heads, columns = (1, num_kv_heads, num_heads), (1, self.max_seqlen_k)
        if tensor.dim() == 3:
            sizes = ((self.query.shape[0],), heads, columns)
        else:
            sizes = ((1, self.batch), heads, (1, self.max_seqlen_q), columns)
        fits = tensor.dim() == len(sizes) and all(
            size in allowed for size, allowed in zip(tensor.shape, sizes, strict=True)
        )
        if not fits:
            wanted = ", ".join(" or ".join(map(str, dict.fromkeys(allowed))) for allowed in sizes)
            raise ValueError(f"{name} must have shape ({wanted}), got {tuple(tensor.shape)}")
        if tensor.dim() == 4:
            return tensor
        return self.pad(tensor, self.query_index).transpose(1, 2)

    def intervals(self, attn_mask, attn_bias, is_causal: bool) -> tuple[Visibility, torch.Tensor]:
        """Returns who sees a key, in rows of all keys, and the row (total_q,) of each query, -1 for none."""
        sequence, place = self._places(self.key_bounds, self.key)
        rows = torch.arange(len(place), device=place.device)
        birth = (rows if is_causal else self.key_bounds[sequence]).int()
        death = self.key_bounds[sequence + 1].int()
        birth, death = (bound.expand(1, self._num_heads(attn_mask, attn_bias), -1) for bound in (birth, death))
        if attn_mask is not None:
            death = torch.where(self._of_keys(attn_mask, attn_bias, attn_mask) != 0, death, birth)
        sequence, place = self._places(self.query_bounds, self.query)
        end = self.key_bounds[sequence + 1]
        row = end - self.query_bounds[sequence + 1] + self.query_bounds[sequence] + place
        if not is_causal:
            row = self.key_bounds[sequence]
        return Visibility(birth, death), torch.where((row < self.key_bounds[sequence]) | (row >= end), -1, row).int()

    def importance(self, attn_mask, attn_bias) -> torch.Tensor | None:
        """Returns the bias of every key, (1, Hi, total_k)."""
        return None if attn_bias is None else self._of_keys(attn_mask, attn_bias, attn_bias)

    def padding_mask(self, attn_mask, is_causal: bool) -> torch.Tensor:
        """Returns bool (B, heads, max_seqlen_q, max_seqlen_k): the mask, and no padding, and no future."""
        device = self.query.device
        num_keys = (self.key_bounds[1:] - self.key_bounds[:-1])[:, None, None, None]
        num_queries = (self.query_bounds[1:] - self.query_bounds[:-1])[:, None, None, None]
        row = torch.arange(self.max_seqlen_q, device=device)[:, None]
        column = torch.arange(self.max_seqlen_k, device=device)
        visible = (column < num_keys) & (row < num_queries)
        if is_causal:
            visible = visible & (column <= row + num_keys - num_queries)
        return visible if attn_mask is None else visible & (attn_mask != 0)

    @cached_property
    def query_index(self) -> torch.Tensor:
        return self._index(self.query_bounds, self.max_seqlen_q)

    @cached_property
    def key_index(self) -> torch.Tensor:
        return self._index(self.key_bounds, self.max_seqlen_k)

    def pad(self, tensor: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """Lays (total, ...) out as (B, longest, ...), zero where there is no row."""
        is_row = (index >= 0).view(*index.shape, *[1] * (tensor.dim() - 1))
        if len(tensor) == 0:
            return tensor.new_zeros(*index.shape, *tensor.shape[1:])
        return torch.where(is_row, tensor[index.clamp(min=0)], 0)

    def unpad(self, tensor: torch.Tensor) -> torch.Tensor:
        """Lays (B, max_seqlen_q, ...) out as (total_q, ...)."""
        sequence, place = self._places(self.query_bounds, self.query)
        return tensor[sequence, place]

    def _num_heads(self, attn_mask, attn_bias) -> int:
        heads = [tensor.shape[1] for tensor in (attn_mask, attn_bias) if tensor is not None]
        num_heads, num_kv_heads = self.query.shape[1], self.key.shape[1]
        return num_heads if max(heads, default=1) > num_kv_heads else num_kv_heads

    def _of_keys(self, attn_mask, attn_bias, tensor: torch.Tensor) -> torch.Tensor:
        """Lays (1 or B, heads, 1, 1 or max_seqlen_k) out as (1, Hi, total_k)."""
        heads = self._num_heads(attn_mask, attn_bias)
        tensor = tensor[:, :, 0]
        if tensor.shape[1] not in (1, heads):
            tensor = tensor.repeat_interleave(heads // tensor.shape[1], dim=1)
        sequence, place = self._places(self.key_bounds, self.key)
        return tensor.expand(self.batch, heads, self.max_seqlen_k)[sequence, :, place].transpose(0, 1)[None]

    @staticmethod
    def _places(bounds: torch.Tensor, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns, for every row, its sequence and its place in that."""
        row = torch.arange(rows.shape[0], device=bounds.device)
        sequence = torch.searchsorted(bounds, row, right=True) - 1
        return sequence, row - bounds[sequence]

    @staticmethod
    def _index(bounds: torch.Tensor, longest: int) -> torch.Tensor:
        """Returns (B, longest) the rows of each sequence, -1 where there is none."""
        index = bounds[:-1, None] + torch.arange(longest, device=bounds.device)
        return torch.where(index < bounds[1:, None], index, -1)


def _longest(name: str, given: int | None, bounds: torch.Tensor) -> int:
    arguments.check_count(name, given, 0)
    if given is None or bounds.device.type == "cpu":
        longest = int((bounds[1:] - bounds[:-1]).max())
        if given is not None and given < longest:
            raise ValueError(f"{name} must be at least {longest}, the longest sequence, got {given}")
    return int(longest if given is None else given)
