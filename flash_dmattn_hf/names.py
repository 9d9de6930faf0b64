"""The names under which transformers knows this attention, and the one of the gate inside an attention module."""

from typing import Any

NAMES = ("flash_dmattn", "dmattn")
GATE_NAME = "dma"


def is_ours(implementation: Any) -> bool:
    """True if an attention implementation's name is one of ours."""
    return implementation in NAMES
