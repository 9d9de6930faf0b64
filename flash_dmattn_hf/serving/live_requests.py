"""The slots of all live requests, and one forward over the tokens of some of them.

A request is one row of the slots of every layer, whatever its length. A forward brings each of its requests one token,
then a step over an index of rows does all of them at once, or a chunk of a prompt, which attends by itself.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from flash_dmattn.slots import decode_step
from flash_dmattn_hf.cache.eviction import EvictingLayer
from flash_dmattn_hf.config import Windows
from flash_dmattn_hf.serving.layers import ServedLayer


class RowTokens(NamedTuple):
    """What a forward brings one request: the row of its slots, how many tokens it had before and how many come now."""

    row: int
    num_before: int
    num_new: int


class LiveRequests:
    """Slots of `num_rows` requests for each of the layers, and which of them the present forward is about.

    layers: layer_idx -> its shape. dtype: of keys and values.
    """

    def __init__(
        self, layers: Mapping[int, ServedLayer], num_rows: int, dtype: torch.dtype, device: torch.device | str
    ):
        self.layers = layers
        self.slots = {index: layer.make_slots(num_rows, dtype, device) for index, layer in layers.items()}
        self.device = torch.device(device)
        self._chunks: list[tuple[int, RowTokens]] = []
        self._rows = self._places = None
        self._num_tokens = 0

    def begin(self, batch: Sequence[RowTokens]) -> None:
        """Says whose tokens the next forward brings, one request after the other in its only row."""
        places, rows, self._chunks, start = [], [], [], 0
        for tokens in batch:
            if tokens.num_new == 1:
                places.append(start)
                rows.append(tokens.row)
            elif tokens.num_new > 1:
                self._chunks.append((start, tokens))
            start += tokens.num_new
        self._num_tokens = start
        self._rows = torch.tensor(rows, dtype=torch.int32, device=self.device) if rows else None
        self._places = torch.tensor(places, device=self.device) if rows and self._chunks else None

    def begin_step(self, rows: torch.Tensor) -> None:
        """Says that the next forward brings one token for each of these rows, none for those that are -1.

        rows: (B,) int32. It is read when the layers attend, in replays of a CUDA graph, too.
        """
        self._chunks, self._places = [], None
        self._num_tokens, self._rows = len(rows), rows

    def attend(
        self,
        layer_idx: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        importance: torch.Tensor,
        **options: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attends, each token to what its request holds in this layer, and evicts.

        query: (1, T, H, D). key: (1, Hkv, T, D), value: (1, Hkv, T, Dv). importance: (1, Hi, T).
        options: `softmax_scale`, `softcap` and `add_importance_bias` of `flash_dmattn.interval_attention`.
        Returns out (1, T, H, Dv) and lse (1, H, T).
        Raises ValueError when T is not the number of tokens that `begin` was told.
        """
        if query.shape[:2] != (1, self._num_tokens):
            raise ValueError(f"query must hold the {self._num_tokens} tokens of this batch, got {tuple(query.shape)}")
        layer, slots = self.layers[layer_idx], self.slots[layer_idx]
        single = None if self._rows is None else self._step(layer, slots, query, key, value, importance, options)
        if not self._chunks:
            return single[0].transpose(0, 1), single[1].permute(2, 1, 0)
        out = query.new_empty(*query.shape[:3], value.shape[3])
        lse = torch.empty(1, *query.shape[2:0:-1], dtype=slots.importance.dtype, device=query.device)
        if single is not None:
            out[0, self._places] = single[0].squeeze(1)
            lse[0][:, self._places] = single[1].squeeze(2).transpose(0, 1)
        for start, tokens in self._chunks:
            here = slice(start, start + tokens.num_new)
            chunk = EvictingLayer(layer.windows)
            chunk.borrow(type(slots)(*(state[tokens.row : tokens.row + 1] for state in slots)), tokens.num_before)
            chunk.take(key[:, :, here], value[:, :, here], importance[:, :, here])
            out[:, here], lse[:, :, here] = chunk.attend(query[:, here], return_lse=True, **options)
        return out, lse

    def _step(self, layer, slots, query, key, value, importance, options) -> tuple[torch.Tensor, torch.Tensor]:
        """One more token for each of the rows; returns out (B, 1, H, Dv) and lse (B, H, 1)."""
        tokens = [query[0], key[0].transpose(0, 1), value[0].transpose(0, 1)]  # (T, heads, D)
        importance = importance[0].transpose(0, 1)
        if self._places is not None:
            *tokens, importance = (states[self._places] for states in (*tokens, importance))
        query, key, value = (states.unsqueeze(1) for states in tokens)
        _, num_sinks, local_window, sliding_window = layer.windows
        return decode_step(
            query,
            key,
            value,
            importance.unsqueeze(-1),
            slots,
            num_sink_tokens=num_sinks,
            local_window_size=local_window,
            sliding_window=sliding_window,
            rows=self._rows,
            return_lse=True,
            **options,
        )

    def check_windows(self, layer_idx: int, windows: Windows) -> None:
        """Raises ValueError unless a layer still has the windows for which its slots were made."""
        made_for = self.layers[layer_idx].windows
        if windows != made_for:
            raise ValueError(
                f"the windows of layer {layer_idx} must stay as they were when continuous batching began, {made_for}, "
                f"got {windows}: stop the manager and make a new one"
            )

    def clear(self, row: int) -> None:
        """Empties a row, values included: what one request left must not reach another, not even a NaN."""
        for slots in self.slots.values():
            for name, state in slots._asdict().items():
                state[row] = -1 if name == "positions" else 0

    def copy(self, source: int, target: int) -> None:
        """Makes a row the same as another."""
        for slots in self.slots.values():
            for state in slots:
                state[target] = state[source]
