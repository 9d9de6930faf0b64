"""The calls: what every backend is given, one value per kind of work."""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch.nn.functional import pad

from flash_dmattn.dropout import draw_seed
from flash_dmattn.operators import OperatorCall
from flash_dmattn.ranking import comparable
from flash_dmattn.visibility import NEVER, SoftCut, Visibility


@dataclass(frozen=True, kw_only=True)
class AttentionCall(OperatorCall):
    """The checked arguments of one attention over intervals.

    query: (B, Sq, H, D). key: (B, Sk, Hkv, D), value: (B, Sk, Hkv, Dv), query's dtype. A backend gets Dv = D.
    importance: (B, Hi, Sk) float32 (float64 for float64), contiguous, or None for no bias; NaN counts as -inf, +inf as
        the largest float32.
    birth, death: (B, Hi, Sk) int32, contiguous; Hi is Hkv or H. Both None: every key is visible from its own row on.
    query_start: (B,) int32, contiguous, the row of the first query, the others follow; or None.
    query_positions: (B, Sq) int32, contiguous, the row of every query, -1 for one that sees nothing; or None. When both
        are given, query_positions is query_start + i except for its -1; when neither is, the queries are the last rows.
    soft: a gate on pairs of query and key, which is added to the logits; its tensors are contiguous; or None.
    dropout_seed: (B,) int64, contiguous, which weights are dropped (`flash_dmattn.dropout`); None: none is.
    max_visible: n consecutive rows see no more than max_visible + n keys altogether; None when that is unknown.
    softmax_scale: factor of the dot product. softcap: 0 is off.
    dropout_p: with a seed, how likely a weight is dropped, from 0 to below 1; the others are divided by 1 - dropout_p.
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
    soft: SoftCut | None
    dropout_seed: torch.Tensor | None
    max_visible: int | None
    softmax_scale: float
    softcap: float
    dropout_p: float
    deterministic: bool

    DIFFERENTIABLE = ("query", "key", "value", "importance", "soft_score", "soft_threshold")

    @classmethod
    def prepare(
        cls,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        importance: torch.Tensor | None,
        visibility: Visibility | None,
        *,
        query_start: int | torch.Tensor | None = None,
        query_positions: torch.Tensor | None = None,
        soft: SoftCut | None = None,
        max_visible: int | None = None,
        softmax_scale: float | None = None,
        softcap: float = 0.0,
        dropout_p: float = 0.0,
        dropout_seed: torch.Tensor | None = None,
        deterministic: bool = False,
    ) -> "AttentionCall":
        """Returns the call of checked arguments, laid out as backends want them.

        softmax_scale: None: D ** -0.5. dropout_seed: None, and dropout_p above 0: drawn from torch's generator.
        The rest as above, but of any layout; query_start may be an int, dropout_p 0, and Hi 1 for all heads alike.
        """
        batch, seqlen_q, _, head_dim = query.shape
        if isinstance(query_start, torch.Tensor):
            query_start = query_start.contiguous()
        elif visibility is None and query_positions is None and query_start == key.shape[1] - seqlen_q:
            query_start = None  # backends know that row without being told
        elif query_start is not None:
            query_start = torch.full((batch,), query_start, dtype=torch.int32, device=query.device)
        precision = torch.float64 if query.dtype == torch.float64 else torch.float32

        def per_head(tensor: torch.Tensor) -> torch.Tensor:
            return (tensor.expand(-1, key.shape[2], -1) if tensor.shape[1] == 1 else tensor).contiguous()

        if importance is not None:
            importance = per_head(importance.to(precision))
        if soft is not None:
            score, threshold = (per_head(tensor.to(precision)) for tensor in soft[:2])
            soft = SoftCut(score, threshold, per_head(soft.contested_from))
        birth, death = (None, None) if visibility is None else map(per_head, visibility)
        if dropout_p == 0:
            dropout_seed = None
        elif dropout_seed is None:
            dropout_seed = draw_seed(batch, query.device)
        else:
            dropout_seed = dropout_seed.contiguous()
        return cls(
            query=query,
            key=key,
            value=value,
            importance=importance,
            birth=birth,
            death=death,
            query_start=query_start,
            query_positions=None if query_positions is None else query_positions.contiguous(),
            soft=soft,
            dropout_seed=dropout_seed,
            max_visible=max_visible,
            softmax_scale=head_dim**-0.5 if softmax_scale is None else float(softmax_scale),
            softcap=float(softcap),
            dropout_p=float(dropout_p),
            deterministic=deterministic,
        )

    def tensors(self) -> tuple[torch.Tensor | None, ...]:
        """Returns the tensors of the call one by one, None for each that it does without."""
        intervals = self.birth, self.death, self.query_start, self.query_positions
        soft = self.soft or (None, None, None)
        return self.query, self.key, self.value, self.importance, *intervals, *soft, self.dropout_seed

    @property
    def is_ordered(self) -> bool:
        """Whether the rows of a sequence's queries follow each other."""
        return self.query_start is not None or self.query_positions is None

    @property
    def weighs_pairs(self) -> bool:
        """Whether every pair of a query and a key has a number of its own, which takes a kernel more registers."""
        return self.soft is not None or self.dropout_seed is not None

    @property
    def num_interval_heads(self) -> int:
        if self.birth is not None:
            return self.birth.shape[1]
        if self.soft is not None:
            return self.soft.score.shape[1]
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

    def with_one_head_dim(self) -> "AttentionCall":
        """Returns the call with zeros behind the shorter of keys and values, so that Dv = D; differentiable."""
        missing = self.key.shape[3] - self.value.shape[3]
        if missing == 0:
            return self
        if missing > 0:
            return replace(self, value=pad(self.value, (0, missing)))
        return replace(self, query=pad(self.query, (0, -missing)), key=pad(self.key, (0, -missing)))

    def finish_dimportance(self, dimportance: torch.Tensor) -> torch.Tensor | None:
        """Returns the gradient of the importance, 0 where that counts as another number (NaN, +inf), or None."""
        return None if self.importance is None else torch.where(self.importance < torch.inf, dimportance, 0)

    def with_comparable_importance(self) -> "AttentionCall":
        """Returns the call without NaN and +inf in the importance, differentiably."""
        return self if self.importance is None else replace(self, importance=comparable(self.importance))


@dataclass(frozen=True, kw_only=True)
class CutCall(OperatorCall):
    """The checked arguments of one soft cut.

    importance: (B, Hi, Sk) floating point, any value, any layout.
    death: (B, Hi, Sk) int32, contiguous, of the causal selection that is made soft.
    contested_from: (B, Hi, Sk) int32, contiguous, the first row at which a key competes; None: local_window_size rows
        after its own, for a sink never. It must be given where padding stands between the two.
    padding_mask: (B, Sk) bool, contiguous, True for real tokens; None: all are.
    cu_seqlens: (docs + 1,) integers, contiguous; None: one document.
    temperature: () floating point, without a gradient; None: it is fixed_temperature.
    seqlen_q: the queries are the last rows. has_kept_keys: whether a place is left beside sinks and local window.
    """

    importance: torch.Tensor
    death: torch.Tensor
    contested_from: torch.Tensor | None
    padding_mask: torch.Tensor | None
    cu_seqlens: torch.Tensor | None
    temperature: torch.Tensor | None
    fixed_temperature: float
    seqlen_q: int
    num_sink_tokens: int
    local_window_size: int
    has_kept_keys: bool

    DIFFERENTIABLE = ("importance",)

    @property
    def num_documents(self) -> int:
        return 1 if self.cu_seqlens is None else self.cu_seqlens.shape[0] - 1


class Slots(NamedTuple):
    """The state of one layer: w slots per head, in any order. Every tensor is changed in place.

    keys: (B, Hc, w, D), values: (B, Hc, w, Dv), contiguous, finite; Hc is Hkv, or H when importance is per query head.
        In the dtype of the tokens, or rounded to float8_e4m3fn, to be multiplied by the scales.
    importance: (B, Hc, w) float32 (float64 beside float64 keys), without NaN and +inf.
    positions: (B, Hc, w) int32, true positions, -1 for an empty slot.
    victims: (B, Hc) int32, the slot that the next token takes or competes for.
    lengths: (B, Hc) int32, real tokens so far, the same for all heads of a batch row.
    arrivals: (B, Hc) int32, 0 between steps: a backend's count of the programs that have finished a head.
    key_scales, value_scales: (B, Hc, w) bfloat16, a power of 2 per key and per value (`flash_dmattn.float8`), or
        (B, Hc, 0) where keys and values are not rounded.
    """

    keys: torch.Tensor
    values: torch.Tensor
    importance: torch.Tensor
    positions: torch.Tensor
    victims: torch.Tensor
    lengths: torch.Tensor
    arrivals: torch.Tensor
    key_scales: torch.Tensor
    value_scales: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class DecodeCall(OperatorCall):
    """The checked arguments of one step over fixed slots.

    query: (B, 1, H, D). key: (B, 1, Hkv, D), value: (B, 1, Hkv, Dv), query's dtype.
    importance: (B, Hc, 1) floating point, any value.
    padding_mask: (B, 1) bool, False where a row has no token; None: all have one.
    rows: (B,) int32, the row of the slots that each token belongs to, negative where there is none; None: its own. No
        row twice.
    slots: the state, which the step changes.
    The other fields as in `flash_dmattn.slots.decode_step`.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    importance: torch.Tensor
    padding_mask: torch.Tensor | None
    rows: torch.Tensor | None
    slots: Slots
    num_sink_tokens: int
    local_window_size: int
    sliding_window: int | None
    softmax_scale: float
    softcap: float
    add_importance_bias: bool


@dataclass(frozen=True, kw_only=True)
class DenseCall(OperatorCall):
    """The checked arguments of one attention under a mask and a bias.

    query: (B, Sq, H, D). key, value: (B, Sk, Hkv, D), query's dtype.
    attn_mask: (1 or B, 1 or Hkv or H, 1 or Sq, 1 or Sk), bool or floating point, zero hides a key; None hides nothing.
    attn_bias: of such a shape, floating point, added to the logits (NaN as -inf, +inf as the largest float32); or None.
    tiles: what `TiledMask` knows of attn_mask, None when nothing is known.
    is_causal: query i sees no key after i + Sk - Sq.
    softmax_scale: factor of the dot product. softcap: 0 is off.
    deterministic: equal inputs must give bitwise equal gradients.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    attn_mask: torch.Tensor | None
    attn_bias: torch.Tensor | None
    tiles: torch.Tensor | None
    is_causal: bool
    softmax_scale: float
    softcap: float
    deterministic: bool

    DIFFERENTIABLE = ("query", "key", "value", "attn_bias")

    @property
    def group_size(self) -> int:
        return self.query.shape[2] // self.key.shape[2]

    @property
    def is_empty(self) -> bool:
        return self.query.numel() == 0 or self.key.shape[1] == 0
