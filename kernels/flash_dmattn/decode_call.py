"""One decoding step: the fixed slots of a layer, and what every engine that decodes is given."""

from dataclasses import dataclass
from typing import NamedTuple

import torch


class Slots(NamedTuple):
    """The state of one layer: w slots per head, in any order. Every tensor is changed in place.

    keys, values: (B, Hc, w, D), contiguous, finite; Hc is Hkv, or H when importance is per query head.
    importance: (B, Hc, w) float32 (float64 beside float64 keys), without NaN and +inf.
    positions: (B, Hc, w) int32, true positions, -1 for an empty slot.
    victims: (B, Hc) int32, the slot that the next token takes or competes for.
    lengths: (B, Hc) int32, real tokens so far, the same for all heads of a batch row.
    arrivals: (B, Hc) int32, 0 between steps: an engine's count of the programs that have finished a head.
    """

    keys: torch.Tensor
    values: torch.Tensor
    importance: torch.Tensor
    positions: torch.Tensor
    victims: torch.Tensor
    lengths: torch.Tensor
    arrivals: torch.Tensor


@dataclass(frozen=True)
class DecodeCall:
    """The checked arguments of one step.

    query: (B, 1, H, D). key, value: (B, 1, Hkv, D), query's dtype. importance: (B, Hc, 1) floating point, any value.
    padding_mask: (B, 1) bool, False where a row has no token; None: all have one.
    slots: the state, which the step changes.
    The other fields as in `flash_dmattn.slots.decode_step`.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    importance: torch.Tensor
    padding_mask: torch.Tensor | None
    slots: Slots
    num_sink_tokens: int
    local_window_size: int
    sliding_window: int | None
    softmax_scale: float
    softcap: float
    add_importance_bias: bool
