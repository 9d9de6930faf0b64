"""The names under which transformers knows this attention, and the one of the gate inside an attention module."""

from typing import Any

NAMES = ("flash_dmattn", "dmattn")
GATE_NAME = "dma"
DENSE_ON_RANKS = "dmattn_dense_on_ranks"
"""Dense attention inside a `context_parallel` block, which `conversion.variants.dense` chooses there.

Without the word "flash", of which transformers would make a request for another library.
"""


def is_ours(implementation: Any) -> bool:
    """True if an attention implementation's name is one of ours."""
    return implementation in NAMES
