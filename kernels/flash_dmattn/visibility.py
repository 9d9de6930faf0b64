"""The interval of queries that see a key: what selection yields and attention consumes."""

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
