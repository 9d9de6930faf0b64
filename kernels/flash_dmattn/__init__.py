"""Dynamic Mask Attention: exact, trainable top-k sparse attention in O(N) memory.

`dynamic_mask_attention` is the whole of it: every query attends only to the `keep_window_size` most important
keys of its past. `select_visible` turns importances into one interval of queries per key, `interval_attention`
attends over such intervals.
"""

from flash_dmattn.attention import dynamic_mask_attention, interval_attention
from flash_dmattn.dispatch import explain_backends, get_available_backends
from flash_dmattn.selection import select_visible
from flash_dmattn.visibility import NEVER, Visibility

__all__ = [
    "NEVER",
    "Visibility",
    "dynamic_mask_attention",
    "explain_backends",
    "get_available_backends",
    "interval_attention",
    "select_visible",
]
