"""Dynamic Mask Attention: exact, trainable top-k sparse attention in O(N) memory.

`dynamic_mask_attention` is the whole of it: every query attends only to the `keep_window_size` most important
keys of its past. `select_visible` turns importances into one interval of queries per key, `interval_attention`
attends over such intervals. `flash_dmattn_func` and its kin take any mask and any bias instead.
"""

from flash_dmattn.attention import dynamic_mask_attention, interval_attention
from flash_dmattn.backends.device import why_no_gpu
from flash_dmattn.blocks import Blocks, find_blocks
from flash_dmattn.dense.functions import (
    flash_dmattn_func,
    flash_dmattn_func_auto,
    flash_dmattn_kvpacked_func,
    flash_dmattn_qkvpacked_func,
    flex_dmattn_func,
    triton_dmattn_func,
)
from flash_dmattn.dense.varlen import (
    flash_dmattn_varlen_func,
    flash_dmattn_varlen_kvpacked_func,
    flash_dmattn_varlen_qkvpacked_func,
)
from flash_dmattn.dispatch import explain_backends, explain_jobs, get_available_backends
from flash_dmattn.selection import select_visible
from flash_dmattn.visibility import NEVER, SoftCut, Visibility

__all__ = [
    "Blocks",
    "CUDA_AVAILABLE",
    "FLEX_AVAILABLE",
    "NEVER",
    "SoftCut",
    "TRITON_AVAILABLE",
    "Visibility",
    "dynamic_mask_attention",
    "explain_backends",
    "explain_jobs",
    "find_blocks",
    "flash_dmattn_func",
    "flash_dmattn_func_auto",
    "flash_dmattn_kvpacked_func",
    "flash_dmattn_qkvpacked_func",
    "flash_dmattn_varlen_func",
    "flash_dmattn_varlen_kvpacked_func",
    "flash_dmattn_varlen_qkvpacked_func",
    "flex_dmattn_func",
    "get_available_backends",
    "interval_attention",
    "select_visible",
    "triton_dmattn_func",
]


def __getattr__(name: str) -> bool:
    """CUDA_AVAILABLE, TRITON_AVAILABLE, FLEX_AVAILABLE: asked for when they are read, not at import."""
    if name == "CUDA_AVAILABLE":  # for masks and biases, whose kernels are written in Triton
        return why_no_gpu() is None and explain_backends()["triton"] is None
    if name in ("TRITON_AVAILABLE", "FLEX_AVAILABLE"):
        return explain_backends()[name.removesuffix("_AVAILABLE").lower()] is None
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
