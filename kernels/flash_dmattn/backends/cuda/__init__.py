"""The CUDA backend: selection, key lists, forward and backward, for GPUs from compute capability 8.0 on."""

import torch

from flash_dmattn.backends import triton
from flash_dmattn.backends.cuda import library, lists, target
from flash_dmattn.backends.cuda.attention_plan import plan_attention, reject_plan  # noqa: F401
from flash_dmattn.backends.cuda.backward_pass import reject_backward, run_backward  # noqa: F401
from flash_dmattn.backends.cuda.forward_pass import run_forward, tile_rows
from flash_dmattn.backends.cuda.lists import build_key_lists  # noqa: F401
from flash_dmattn.backends.cuda.lists import reject as reject_key_lists  # noqa: F401
from flash_dmattn.backends.cuda.selection import reject as reject_selection  # noqa: F401
from flash_dmattn.backends.cuda.selection import select_visible  # noqa: F401
from flash_dmattn.backends.device import why_no_gpu
from flash_dmattn.calls import AttentionCall

_DTYPES = (torch.float16, torch.bfloat16)
_MAX_GROUP_SIZE = 16

AUTOMATIC_ON = ("cuda",)


def why_unavailable() -> str | None:
    return library.why_unavailable() or why_no_gpu()


def reject(call: AttentionCall) -> str | None:
    device = call.query.device
    if call.soft is not None:
        return "it has no soft selection"
    if call.dropout_seed is not None:
        return "it has no dropout"
    reason = lists.reject(call) or target.reject(device)
    if reason is not None:
        return reason
    if call.query.dtype not in _DTYPES:
        return f"dtype {call.query.dtype} is not supported (float16 and bfloat16 are)"
    head_dim = call.query.shape[-1]
    if head_dim not in library.head_dims():
        return f"head dim {head_dim} is not one of {library.head_dims()}, for which the CUDA library was built"
    if tile_rows(call) == 0:
        return f"the CUDA library was built without the forward for head dim {head_dim} and {call.query.dtype}"
    group_size = call.query.shape[2] // call.num_interval_heads
    if group_size > _MAX_GROUP_SIZE:
        return f"{group_size} query heads per interval head are above {_MAX_GROUP_SIZE}"
    for name, tensor in (("query", call.query), ("key", call.key), ("value", call.value)):
        if tensor.stride(-1) != 1:
            return f"{name} is not contiguous in the head dim"
        batch_stride, row_stride, head_stride, _ = tensor.stride()
        if tensor.data_ptr() % 16 == (batch_stride | row_stride | head_stride) % 8 == 0:
            continue
        strides = [stride for stride, size in zip(tensor.stride()[:3], tensor.shape[:3], strict=True) if size > 1]
        if tensor.data_ptr() % 16 or any(stride % 8 for stride in strides):
            return f"the rows of {name} are not aligned to 16 bytes"
    return None


def forward(call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns out, lse and stats, as the operator does."""
    if call.query.numel() == 0 or call.key.shape[1] == 0:
        return triton.forward(call)
    return run_forward(call)


def backward(
    call: AttentionCall, out: torch.Tensor, stats: torch.Tensor, dout: torch.Tensor, dlse: torch.Tensor
) -> tuple[torch.Tensor | None, ...]:
    """Returns a gradient for each of call.DIFFERENTIABLE, None for what the call does not have."""
    return *run_backward(call, out, stats, dout, dlse), None, None
