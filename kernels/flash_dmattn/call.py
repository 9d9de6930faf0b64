"""One attention call: what every backend is given."""

from dataclasses import dataclass

import torch

from flash_dmattn.visibility import NEVER


@dataclass(frozen=True)
class AttentionCall:
    """The checked arguments of one attention over intervals.

    query: (B, Sq, H, D). key, value: (B, Sk, Hkv, D), query's dtype.
    importance: (B, Hi, Sk) float32 (float64 for float64), contiguous, without NaN and +inf, or None for no bias.
    birth, death: (B, Hi, Sk) int32, contiguous; Hi is Hkv or H. Both None: every key is visible from its own row on.
    query_start: (B,) int32, contiguous, the row of the first query, the others follow; None when the rows follow no
        such order.
    query_positions: (B, Sq) int32, contiguous, the row of every query, -1 for one that sees nothing; or None. At least
        one of the two is given; when both are, query_positions is query_start + i except for its -1.
    max_visible: n consecutive rows see no more than max_visible + n keys altogether; None when that is unknown.
    softmax_scale: factor of the dot product. softcap: 0 is off.
    deterministic: equal inputs must give bitwise equal gradients.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    importance: torch.Tensor | None
    birth: torch.Tensor | None
    death: torch.Tensor | None
    query_start: torch.Tensor | None
    query_positions: torch.Tensor | None
    max_visible: int | None
    softmax_scale: float
    softcap: float
    deterministic: bool

    @property
    def num_interval_heads(self) -> int:
        if self.birth is not None:
            return self.birth.shape[1]
        return self.key.shape[2] if self.importance is None else self.importance.shape[1]

    def intervals(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns birth and death, (B, Hi, Sk) int32, also where the call leaves them out."""
        if self.birth is not None:
            return self.birth, self.death
        batch, seqlen_k = self.key.shape[:2]
        birth = torch.arange(seqlen_k, device=self.key.device, dtype=torch.int32)
        birth = birth.expand(batch, self.num_interval_heads, seqlen_k).contiguous()
        return birth, torch.full_like(birth, NEVER)

    def query_rows(self) -> torch.Tensor:
        """Returns the row of every query, (B, Sq) int32; -1 sees nothing."""
        if self.query_positions is not None:
            return self.query_positions
        steps = torch.arange(self.query.shape[1], device=self.query.device, dtype=torch.int32)
        return self.query_start[:, None] + steps
