"""The Triton backend: kernels in Triton; with TRITON_INTERPRET=1 they run on a CPU, slowly, for tests."""

import torch

from flash_dmattn.backends import triton
from flash_dmattn.backends.device import reject_lanes, reject_layout
from flash_dmattn.calls import DenseCall

AUTOMATIC_ON = triton.AUTOMATIC_ON


def why_unavailable() -> str | None:
    return triton.why_unavailable()


def reject(call: DenseCall) -> str | None:
    reason = triton.reject_query(call.query) or reject_lanes(call.query.shape[0] * call.query.shape[2])
    if reason is not None:
        return reason
    for name, tensor in (("attn_mask", call.attn_mask), ("attn_bias", call.attn_bias)):
        if tensor is not None and tensor.dtype not in (*triton.DTYPES, torch.bool):
            return f"{name} of dtype {tensor.dtype} is not supported (float16, bfloat16 and float32 are)"
    return reject_layout(call)


def forward(call: DenseCall) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns out, lse and stats, as the operator does."""
    from flash_dmattn.dense.forward_kernels import run_forward

    return triton.empty_forward(call.query) if call.is_empty else run_forward(call)


def backward(
    call: DenseCall, out: torch.Tensor, stats: torch.Tensor, dout: torch.Tensor, dlse: torch.Tensor, needs_dbias: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Returns the gradients of query, key, value and, when needed, of attn_bias, in their dtypes and shapes."""
    from flash_dmattn.dense.backward_kernels import run_backward

    if not call.is_empty:
        return run_backward(call, out, stats, dout, dlse, needs_dbias)
    tensors = (call.query, call.key, call.value, *((call.attn_bias,) if needs_dbias else ()))
    gradients = [torch.zeros_like(tensor, memory_format=torch.contiguous_format) for tensor in tensors]
    return *gradients[:3], gradients[3] if needs_dbias else None
