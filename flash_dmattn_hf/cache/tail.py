"""Tokens that wait behind the slots of a cache layer: those being processed, or all that can be undone."""

import torch

from flash_dmattn.float8 import keys_and_values
from flash_dmattn.slots import Slots

ROWS = ("keys", "values", "importance", "positions")


class Tail:
    """Keys, values, importances and positions of n tokens in order, as the fields of `Slots` of these names.

    rows: name -> (B, Hc, n, ...), empty before the first token.
    """

    def __init__(self):
        self.rows: dict[str, torch.Tensor] = {}

    def __len__(self) -> int:
        return self.rows["positions"].shape[2] if self.rows else 0

    def append(self, key: torch.Tensor, value: torch.Tensor, importance: torch.Tensor, positions: torch.Tensor) -> None:
        """key, value: (B, Hkv, T, head dim). importance: (B, Hc, T). positions: (B, T) int32, -1 for padding."""
        batch, num_heads, length = importance.shape
        repeats = num_heads // key.shape[1]
        if repeats > 1:
            key, value = (states.repeat_interleave(repeats, dim=1) for states in (key, value))
        positions = positions.unsqueeze(1).expand(batch, num_heads, length)
        new = dict(zip(ROWS, (key, value, importance, positions), strict=True))
        self.rows = {name: torch.cat([self.rows[name], new[name]], dim=2) for name in ROWS} if self.rows else new

    def num_real(self, count: int) -> torch.Tensor | int:
        """Returns how many of the last tokens are no padding, (B,) int32; 0 of none."""
        return (self.rows["positions"][:, 0, len(self) - count :] >= 0).sum(-1, dtype=torch.int32) if count else 0

    def drop_last(self, count: int) -> None:
        """Forgets the last tokens."""
        num_left = len(self) - count
        self.rows = {name: rows[:, :, :num_left] for name, rows in self.rows.items()} if num_left else {}

    def behind(self, slots: Slots, num_kept: int) -> tuple[torch.Tensor, ...]:
        """Returns keys, values, importance and positions of the first `num_kept` slots, in order, and of the tail."""
        tail = tuple(self.rows[name] for name in ROWS)
        if num_kept == 0:
            return tail
        held = keys_and_values(slots, self.rows["values"].dtype, num_kept)
        held += slots.importance[:, :, :num_kept], slots.positions[:, :, :num_kept]
        order = in_order(slots, num_kept)
        return tuple(torch.cat([pick(states, order), new], dim=2) for states, new in zip(held, tail, strict=True))


def in_order(slots: Slots, num_kept: int) -> torch.Tensor:
    """Returns the first `num_kept` slots, empty ones first, the others in the order of their positions.

    (B, Hc, num_kept) int64. The empty ones are the same places of every head, because all heads keep as many keys.
    """
    return slots.positions[:, :, :num_kept].argsort(dim=-1)


def pick(states: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Returns the rows (B, Hc, m) of states (B, Hc, n, ...)."""
    if states.dim() == 4:
        return states.gather(2, index.unsqueeze(-1).expand(*index.shape, states.shape[-1]))
    return states.gather(2, index)
