"""One attention call: what every backend is given."""

from dataclasses import dataclass, replace

import torch

from flash_dmattn.importance import comparable
from flash_dmattn.visibility import NEVER, SoftCut


@dataclass(frozen=True)
class AttentionCall:
    """The checked arguments of one attention over intervals.

    query: (B, Sq, H, D). key, value: (B, Sk, Hkv, D), query's dtype.
    importance: (B, Hi, Sk) float32 (float64 for float64), contiguous, or None for no bias; NaN counts as -inf, +inf as
        the largest float32.
    birth, death: (B, Hi, Sk) int32, contiguous; Hi is Hkv or H. Both None: every key is visible from its own row on.
    query_start: (B,) int32, contiguous, the row of the first query, the others follow; or None.
    query_positions: (B, Sq) int32, contiguous, the row of every query, -1 for one that sees nothing; or None. When both
        are given, query_positions is query_start + i except for its -1; when neither is, the queries are the last rows.
    max_visible: n consecutive rows see no more than max_visible + n keys altogether; None when that is unknown.
    softmax_scale: factor of the dot product. softcap: 0 is off.
    deterministic: equal inputs must give bitwise equal gradients.
    soft: a gate on pairs of query and key, added to the logits, its tensors contiguous; or None.
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
    soft: SoftCut | None = None

    @property
    def is_ordered(self) -> bool:
        """Whether the rows of a sequence's queries follow each other."""
        return self.query_start is not None or self.query_positions is None

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
        return self.first_rows()[:, None] + steps

    def first_rows(self) -> torch.Tensor:
        """Returns the row of each sequence's first query, (B,) int32, of a call that is ordered."""
        if self.query_start is not None:
            return self.query_start
        first_row = self.key.shape[1] - self.query.shape[1]
        return torch.full((self.query.shape[0],), first_row, dtype=torch.int32, device=self.query.device)

    def with_comparable_importance(self) -> "AttentionCall":
        """Returns the call without NaN and +inf in the importance, differentiably."""
        return self if self.importance is None else replace(self, importance=comparable(self.importance))
