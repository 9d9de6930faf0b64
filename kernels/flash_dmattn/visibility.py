"""What selection yields and attention consumes: the interval of queries that see a key, and a soft cut."""

from typing import NamedTuple

import torch

NEVER = 2**31 - 1
"""The death of a key that is never evicted (int32 maximum)."""


class Visibility(NamedTuple):
    """Key j is visible to the query at row t if and only if `birth_j <= t < death_j`.

    birth: (B, Hi, Sk) int32, the first row that sees the key.
    death: (B, Hi, Sk) int32, the first row that no longer sees it; `NEVER` when there is none.
    """

    birth: torch.Tensor
    death: torch.Tensor


class SoftCut(NamedTuple):
    """A gate on pairs of query row t and key j: log sigmoid(score_j - threshold_t) from the row contested_from_j on.

    score: (B, Hi, Sk) float32 (float64 beside float64 queries).
    threshold: (B, Hi, Sq) in score's dtype, one for each query; -inf: nothing is gated.
    contested_from: (B, Hi, Sk) int32, the first row that gates the key, `NEVER` for one that is never gated.

    The gradient goes to score and threshold.
    """

    score: torch.Tensor
    threshold: torch.Tensor
    contested_from: torch.Tensor
