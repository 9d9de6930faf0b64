"""The slots of all live requests, and one forward over the tokens of some of them.

A request is one row of the slots of every layer, whatever its length. A forward brings each of its requests one token,
then a step over an index of rows does all of them at once, or a chunk of a prompt, which attends by itself.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from flash_dmattn.calls import Slots
from flash_dmattn.slots import decode_step
from flash_dmattn_hf.cache.eviction import CacheView, view_of_slots
from flash_dmattn_hf.config import Windows
from flash_dmattn_hf.serving.chunks import Chunk, PaddedChunk, RowTokens
from flash_dmattn_hf.serving.layers import ServedLayer


class LiveRequests:
    """Slots of `num_rows` requests for each of the layers, and which of them the present forward is about.

    layers: layer_idx -> its shape. dtype: of keys and values.
    """

    def __init__(
        self, layers: Mapping[int, ServedLayer], num_rows: int, dtype: torch.dtype, device: torch.device | str
    ):
        self.layers, self.dtype = layers, dtype
        self.slots = {index: layer.make_slots(num_rows, dtype, device) for index, layer in layers.items()}
        self.device = torch.device(device)
        self._chunks: list[Chunk | PaddedChunk] = []
        self._views: dict[int, list[CacheView]] = {}  # of layers whose keys others use: what each chunk sees
        self._rows = None
        self._places: slice | torch.Tensor = slice(None)  # of single tokens
        self._num_tokens = 0

    def begin(self, batch: Sequence[RowTokens]) -> None:
        """Says whose tokens the next forward brings, one request after the other in its only row."""
        places, rows, self._chunks, self._views, start = [], [], [], {}, 0
        for tokens in batch:
            if tokens.num_new == 1:
                places.append(start)
                rows.append(tokens.row)
            elif tokens.num_new > 1:
                self._chunks.append(Chunk(start, tokens))
            start += tokens.num_new
        self._num_tokens = start
        self._rows = torch.tensor(rows, dtype=torch.int32, device=self.device) if rows else None
        self._places = torch.tensor(places, device=self.device) if rows and self._chunks else slice(None)

    def begin_step(self, rows: torch.Tensor) -> None:
        """Says that the next forward brings one token for each of these rows, none for those that are -1.

        rows: (B,) int32. It is read when the layers attend, in replays of a CUDA graph, too.
        """
        self._chunks, self._views, self._places = [], {}, slice(None)
        self._num_tokens, self._rows = len(rows), rows

    def begin_padded(self, rows: torch.Tensor, chunk: PaddedChunk) -> None:
        """Says that the next forward brings one token for each of these rows, and then those of a chunk.

        rows: as in `begin_step`. chunk: of C places, which may be among those of rows that are -1. There are B + C
        tokens. All is read when the layers attend, in replays of a CUDA graph, too.
        """
        self._chunks, self._views, self._rows = [chunk], {}, rows
        self._places, self._num_tokens = slice(0, len(rows)), len(rows) + len(chunk.places)

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
        options = {"return_lse": True, **options}
        single, parts, views = None, [], []
        if self._rows is not None:
            single = self._step(layer, slots, query, key, value, importance, options)
        for chunk in self._chunks:
            here, own = chunk.places, chunk.borrow(slots, layer.windows, self.dtype)
            own.take(key[:, :, here], value[:, :, here], importance[:, :, here])
            view = own.view(chunk.padding_mask)
            parts.append(view.attend(query[:, here], layer.windows.keep_window_size, **options))
            own.evict()
            chunk.give_back(own, slots)
            if layer.is_shared:
                views.append(view)
        self._views[layer_idx] = views
        return self._put_together(single, parts)

    def attend_again(self, layer_idx: int, query: torch.Tensor, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Attends to what the tokens of this forward saw in an earlier layer, whose keys this one shares.

        layer_idx: of that layer. query, options, what is returned: as in `attend`.
        """
        layer, slots = self.layers[layer_idx], self.slots[layer_idx]
        options = {"return_lse": True, **options}
        most, single = layer.windows.keep_window_size, None
        if self._rows is not None:
            index = self._rows.clamp(min=0).long()
            slots = Slots(*(state[index] for state in slots))
            view = view_of_slots(slots, self.dtype, layer.windows, (self._rows >= 0)[:, None])
            single = view.attend(self._singles(query[0]), most, **options)
        parts = [
            view.attend(query[:, chunk.places], most, **options)
            for chunk, view in zip(self._chunks, self._views[layer_idx], strict=True)
        ]
        return self._put_together(single, parts)

    def _singles(self, states: torch.Tensor) -> torch.Tensor:
        """Returns those of single tokens, (B, 1, ...), of states (T, ...)."""
        return states[self._places].unsqueeze(1)

    def _put_together(self, single, parts) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns out (1, T, H, Dv) and lse (1, H, T) of all tokens, from those of single tokens and of chunks.

        Those of chunks stand where both have a place: then the single one is padding.
        """
        if not parts:
            return single[0].transpose(0, 1), single[1].permute(2, 1, 0)
        out = parts[0][0].new_zeros(1, self._num_tokens, *parts[0][0].shape[2:])
        lse = parts[0][1].new_zeros(1, out.shape[2], self._num_tokens)
        if single is not None:
            out[0, self._places] = single[0].squeeze(1)
            lse[0][:, self._places] = single[1].squeeze(2).transpose(0, 1)
        for chunk, part in zip(self._chunks, parts, strict=True):
            out[:, chunk.places], lse[:, :, chunk.places] = part
        return out, lse

    def _step(self, layer, slots, query, key, value, importance, options) -> tuple[torch.Tensor, torch.Tensor]:
        """One more token for each of the rows; returns out (B, 1, H, Dv) and lse (B, H, 1)."""
        query, key, value, importance = (
            self._singles(states) for states in (query[0], *(t[0].transpose(0, 1) for t in (key, value, importance)))
        )
        _, num_sinks, local_window, sliding_window = layer.windows
        return decode_step(
            query,
            key,
            value,
            importance.transpose(1, 2),
            slots,
            num_sink_tokens=num_sinks,
            local_window_size=local_window,
            sliding_window=sliding_window,
            rows=self._rows,
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
