"""A static cache that writes down what it was given and what it showed, to compare it with one pass afterwards.

The records are written on the device as part of the step, so steps in a CUDA graph are recorded like any others.
"""

from collections.abc import Iterator

import torch
from transformers import PreTrainedModel

from flash_dmattn import NEVER, Blocks, select_visible
from flash_dmattn_hf import DynamicMaskCache
from flash_dmattn_hf.cache.layer import DynamicMaskCacheLayer

STEPS_AT_ONCE = 256


class RecordedLayer(DynamicMaskCacheLayer):
    """A layer that records every importance and, for every single token, the keys in its slots.

    importances: (B, Hc, max_tokens + 1), the column a token's position; padding is written to the last one.
    seen: (max_steps, B, Hc, w) int32, the positions in the slots when the token of each step attended.
    """

    def __init__(self, gate, max_tokens: int, max_steps: int):
        super().__init__(gate)
        self.max_tokens, self.max_steps = max_tokens, max_steps

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        batch, heads, slots = self.positions.shape
        device = self.positions.device
        self.importances = torch.zeros(batch, heads, self.max_tokens + 1, dtype=self.importance.dtype, device=device)
        self.seen = torch.full((self.max_steps, batch, heads, slots), -1, dtype=torch.int32, device=device)
        self.num_steps = torch.zeros(1, dtype=torch.long, device=device)

    def step(self, query: torch.Tensor, padding_mask: torch.Tensor | None = None, **options):
        self._record(self.lengths[:, :1])
        out = super().step(query, padding_mask, **options)
        self.seen.index_copy_(0, self.num_steps, self.positions.unsqueeze(0))
        self.num_steps.add_(1)
        return out

    def view(self, padding_mask: torch.Tensor | None = None, blocks: Blocks | None = None):
        new = self._new
        view = super().view(padding_mask, blocks)
        self._new = new
        self._record(self._tail.rows["positions"][:, 0, -new[0].shape[2] :])
        self._new = None
        return view

    def _record(self, positions: torch.Tensor) -> None:
        """positions: (B, T) int32, -1 for padding."""
        importance = self._new[2]
        index = positions.long().remainder(self.max_tokens + 1).unsqueeze(1).expand(importance.shape)
        self.importances.scatter_(2, index, importance.to(self.importances.dtype))

    def history(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the importances by position (B, Hc, N), and which of the positions every row has (B, N)."""
        lengths = self.lengths[:, :1]
        total = int(lengths.max())
        return self.importances[:, :, :total], torch.arange(total, device=lengths.device) < lengths

    def one_pass(self, importances: torch.Tensor, is_real: torch.Tensor) -> Iterator[torch.Tensor]:
        """Keys that one pass over all importances shows: yields (S, B, Hc, N) bool for the steps, some at a time."""
        birth, death = select_visible(importances, padding_mask=is_real, **self.windows._asdict())
        for steps in torch.arange(int(self.num_steps), device=birth.device).split(STEPS_AT_ONCE):
            t = self._now(steps)
            yield (birth <= t) & (t < death) & is_real[:, None]

    def shown(self) -> Iterator[torch.Tensor]:
        """The same for the keys in the slots. RuntimeError when a key is in two of them."""
        total = int(self.lengths.max())
        for steps in torch.arange(int(self.num_steps), device=self.seen.device).split(STEPS_AT_ONCE):
            seen = self.seen[steps].long()
            window = NEVER if self.windows.sliding_window is None else self.windows.sliding_window
            is_visible = (seen >= 0) & (self._now(steps) - seen < window)
            shown = torch.zeros(*seen.shape[:3], total + 1, dtype=torch.int32, device=seen.device)
            shown.scatter_add_(3, seen.remainder(total + 1), is_visible.int())
            if (shown[..., :total] > 1).any():
                raise RuntimeError("a key stands in two slots of a head")
            yield shown[..., :total] > 0

    def _now(self, steps: torch.Tensor) -> torch.Tensor:
        """The position of every row's token at these steps, (S, B, 1, 1)."""
        return self.lengths[:, :1, None] - int(self.num_steps) + steps.view(-1, 1, 1, 1)


def recorded_cache(model: PreTrainedModel, max_tokens: int, max_steps: int) -> DynamicMaskCache:
    """A static cache for up to `max_tokens` tokens a row, of which `max_steps` come one by one."""
    cache = DynamicMaskCache(model, static=True)
    cache.layers = [RecordedLayer(layer.gate, max_tokens, max_steps) for layer in cache.layers]
    return cache


def count_other_sets(layer: RecordedLayer, importances: torch.Tensor) -> torch.Tensor:
    """How many heads of every row saw other keys than one pass over these importances shows, (steps, B)."""
    is_real = layer.history()[1]
    pairs = zip(layer.shown(), layer.one_pass(importances, is_real), strict=True)
    return torch.cat([(shown != expected).any(-1).sum(-1) for shown, expected in pairs])


def near_ties(layers: list[RecordedLayer], ulps: int) -> torch.Tensor:
    """At every step, how many heads of every layer had a near tie on the edge of what is visible: (L, steps, B).

    layers: those of one cache. ulps: two importances tie nearly when they differ by less units in the last place.
    """
    first = layers[0]
    is_real = first.history()[1]
    importances = torch.stack([layer.history()[0] for layer in layers])  # (L, B, H, N)
    num_steps, batch = int(first.num_steps), importances.shape[1]
    num_slots, sinks, local, _ = first.windows
    num_competing = num_slots - sinks - local
    if num_competing == 0:
        return importances.new_zeros(len(layers), num_steps, batch, dtype=torch.long)
    competing = importances.masked_fill(~is_real[:, None], -torch.inf)[..., sinks:]
    best = competing.new_full((*competing.shape[:-1], num_competing + 1), -torch.inf)
    edges = []
    for column in competing.split(1, dim=-1):  # one more key competes
        best = torch.cat([best, column], dim=-1).sort(dim=-1, descending=True).values[..., :-1]
        edges.append(best[..., -2:])
    last_in, first_out = torch.stack(edges, dim=-2).unbind(-1)  # (L, B, H, keys that compete)
    size = torch.maximum(last_in.abs(), first_out.abs())
    ulp = torch.nextafter(size, torch.full_like(size, torch.inf)) - size
    is_near = ((last_in - first_out < ulps * ulp) & first_out.isfinite()).sum(2).transpose(1, 2)  # (L, keys, B)
    steps = torch.arange(num_steps, device=is_near.device)
    youngest = (first._now(steps)[..., 0, 0] - local - sinks).long().expand(len(layers), -1, -1)  # (L, steps, B)
    return is_near.gather(1, youngest.clamp(min=0)).masked_fill(youngest < 0, 0)
