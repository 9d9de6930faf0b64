"""Selection by the CUDA library: about fifteen launches, no waiting for the device."""

import ctypes

import torch

from flash_dmattn.backends.cuda import library
from flash_dmattn.backends.device import MAX_LANES
from flash_dmattn.visibility import NEVER

_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

_POINTERS = ("importance", "padding_mask", "cu_seqlens", "birth", "death", "workspace")
_SIZES = (
    "importance_type",
    "batch",
    "num_heads",
    "seqlen",
    "num_docs",
    "num_kept",
    "num_sink_tokens",
    "local_window_size",
    "sliding_window",
    "is_causal",
    "segment_size",
)


class SelectParameters(ctypes.Structure):
    """flash_dmattn_select_params of csrc/selection.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in _POINTERS),
        ("workspace_bytes", ctypes.c_int64),
        ("importance_strides", ctypes.c_int64 * 3),
        *((name, ctypes.c_int32) for name in _SIZES),
    ]


def reject(importance: torch.Tensor, positions: torch.Tensor | None = None) -> str | None:
    """Returns why the library does not select by these importances, or None."""
    if positions is not None:
        return "the keys have positions of their own"
    if importance.dtype not in _TYPES:
        return f"dtype {importance.dtype} is not supported"
    if importance.shape[0] * importance.shape[1] > MAX_LANES or importance.numel() > NEVER:
        return f"{tuple(importance.shape)} are too many keys"
    return library.why_not_on(importance.device)


def select_visible(
    importance: torch.Tensor,
    keep_window_size: int,
    num_sink_tokens: int,
    local_window_size: int,
    sliding_window: int | None,
    is_causal: bool,
    padding_mask: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns birth and death as `flash_dmattn.select_visible` does; allocates 32 bytes a key beside them."""
    batch, num_heads, seqlen = importance.shape
    birth = torch.empty(importance.shape, dtype=torch.int32, device=importance.device)
    death = torch.empty_like(birth)
    if padding_mask is not None:
        padding_mask = padding_mask.contiguous()
    if cu_seqlens is not None:
        cu_seqlens = cu_seqlens.int().contiguous()
    windows = (keep_window_size, num_sink_tokens, local_window_size, sliding_window)
    num_docs = 1 if cu_seqlens is None else cu_seqlens.shape[0] - 1
    parameters = SelectParameters(
        **size_fields((batch, num_heads, seqlen), importance.stride(), importance.dtype, *windows, is_causal, num_docs),
        importance=library.pointer(importance),
        padding_mask=library.pointer(padding_mask),
        cu_seqlens=library.pointer(cu_seqlens),
        birth=library.pointer(birth),
        death=library.pointer(death),
    )
    with torch.cuda.device(importance.device):
        parameters.workspace_bytes = library.function("flash_dmattn_select_workspace")(ctypes.byref(parameters))
    workspace = torch.empty(parameters.workspace_bytes, dtype=torch.uint8, device=importance.device)
    parameters.workspace = library.pointer(workspace)
    library.launch("flash_dmattn_select", parameters, importance.device)
    return birth, death


def size_fields(
    shape: tuple[int, int, int],
    strides: tuple[int, int, int],
    dtype: torch.dtype,
    keep_window_size: int,
    num_sink_tokens: int,
    local_window_size: int,
    sliding_window: int | None,
    is_causal: bool,
    num_docs: int,
) -> dict[str, object]:
    """Returns the fields that are no addresses, for an importance of that shape, those strides and that dtype."""
    batch, num_heads, seqlen = shape
    return {
        "importance_strides": strides,
        "importance_type": _TYPES[dtype],
        "batch": batch,
        "num_heads": num_heads,
        "seqlen": seqlen,
        "num_docs": num_docs,
        "num_kept": min(keep_window_size - local_window_size, NEVER),
        "num_sink_tokens": min(num_sink_tokens, NEVER),
        "local_window_size": local_window_size,
        "sliding_window": -1 if sliding_window is None else sliding_window,
        "is_causal": is_causal,
        # Short segments are solved faster, but each has a threshold to be found.
        "segment_size": 128 if seqlen <= 2**18 else 256,
    }
