"""The names under which transformers knows this attention."""

from typing import Any

NAMES = ("flash_dmattn", "dmattn")


def is_ours(implementation: Any) -> bool:
    """True if an attention implementation's name is one of ours."""
    return implementation in NAMES
