"""The CUDA backend: selection, key lists, forward and backward, for GPUs from compute capability 8.0 on."""

import torch

from flash_dmattn.backends import triton
from flash_dmattn.backends.cuda import library, lists, target
from flash_dmattn.backends.cuda.attention_plan import plan_attention, reject_plan  # noqa: F401
from flash_dmattn.backends.cuda.backward_pass import reject_backward, run_backward  # noqa: F401
from flash_dmattn.backends.cuda.forward_pass import run_forward, tile_rows
from flash_dmattn.backends.cuda.head_dims import cut_rows, fill_rows, fill_up, is_filled_up, kernel_dim
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
    head_dim = kernel_dim(call.query.shape[3])
    if head_dim is None:
        return (
            f"the CUDA library was built for head dims {library.head_dims()}, and none of them is from "
            f"{call.query.shape[3]} to twice as much"
        )
    if tile_rows(head_dim, call.query) == 0:
        return f"the CUDA library was built without the forward for head dim {head_dim} and {call.query.dtype}"
    group_size = call.query.shape[2] // call.num_interval_heads
    if group_size > _MAX_GROUP_SIZE:
        return f"{group_size} query heads per interval head are above {_MAX_GROUP_SIZE}"
    return None if is_filled_up(call) else _reject_layout(call)


def _reject_layout(call: AttentionCall) -> str | None:
    """Returns why no kernel can read the rows of a call as they are, or None."""
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
    if not is_filled_up(call):
        return run_forward(call)
    out, lse, stats = run_forward(fill_up(call))
    return cut_rows(out, call.query.shape[3]), lse, stats


def backward(
    call: AttentionCall, out: torch.Tensor, stats: torch.Tensor, dout: torch.Tensor, dlse: torch.Tensor
) -> tuple[torch.Tensor | None, ...]:
    """Returns a gradient for each of call.DIFFERENTIABLE, None for what the call does not have."""
    if not is_filled_up(call):
        return *run_backward(call, out, stats, dout, dlse), None, None
    *gradients, dimportance = run_backward(fill_up(call), fill_rows(out), stats, fill_rows(dout), dlse)
    return *(cut_rows(gradient, call.query.shape[3]) for gradient in gradients), dimportance, None, None
