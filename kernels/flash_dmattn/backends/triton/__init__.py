"""The portable backend for GPUs: kernels in Triton, compiled at run time, for any NVIDIA GPU.

With TRITON_INTERPRET=1 the same kernels run on a CPU, slowly, for tests; only when the backend is asked for by name.
"""

import functools
import os

import torch

from flash_dmattn.backends.device import MAX_LANES, reject_lanes, reject_layout, why_no_gpu
from flash_dmattn.backends.key_lists import is_listed
from flash_dmattn.calls import AttentionCall, CutCall, DecodeCall
from flash_dmattn.float8 import NUMBERS

_MAX_HEAD_DIM = 256
DTYPES = (torch.float16, torch.bfloat16, torch.float32)

AUTOMATIC_ON = ("cuda",)


@functools.cache
def why_unavailable() -> str | None:
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return f"Triton cannot be imported ({error}); torch's builds for CUDA on Linux bring it"
    return None if is_interpreted() else why_no_gpu()


def reject_query(query: torch.Tensor) -> str | None:
    """Returns why no kernel in Triton serves such a query, or None."""
    reason = _reject_tensor(query)
    if reason is None and query.shape[-1] > _MAX_HEAD_DIM:
        return f"head dim {query.shape[-1]} is above {_MAX_HEAD_DIM}"
    return reason


def _reject_tensor(tensor: torch.Tensor) -> str | None:
    if tensor.device.type != "cuda" and not is_interpreted():
        return f"tensors are on {tensor.device}, not on a CUDA GPU"
    if tensor.dtype not in DTYPES:
        return f"dtype {tensor.dtype} is not supported (float16, bfloat16 and float32 are)"
    return None


def reject(call: AttentionCall) -> str | None:
    reason = reject_query(call.query) or reject_lanes(call.query.shape[0] * call.num_interval_heads)
    if reason is not None:
        return reason
    group_size = call.query.shape[2] // call.num_interval_heads
    if group_size > 32:
        return f"{group_size} query heads per interval head are above 32"
    return reject_layout(call)


def forward(call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns out, lse and stats, as the operator does."""
    from flash_dmattn.backends.triton.causal_kernels import run_causal_forward
    from flash_dmattn.backends.triton.forward_kernels import run_forward

    if call.query.numel() == 0 or call.key.shape[1] == 0:
        return empty_forward(call.query)
    return run_forward(call) if is_listed(call) else run_causal_forward(call)


def backward(
    call: AttentionCall, out: torch.Tensor, stats: torch.Tensor, dout: torch.Tensor, dlse: torch.Tensor
) -> tuple[torch.Tensor | None, ...]:
    """Returns a gradient for each of call.DIFFERENTIABLE, None for what the call does not have."""
    from flash_dmattn.backends.triton.backward_kernels import run_backward

    if call.query.numel() == 0 or call.key.shape[1] == 0:
        tensors = (call.query, call.key, call.value)
        gradients = [torch.zeros_like(tensor, memory_format=torch.contiguous_format) for tensor in tensors]
        others = (call.importance, *((None, None) if call.soft is None else call.soft[:2]))
        return *gradients, *(None if tensor is None else torch.zeros_like(tensor) for tensor in others)
    return run_backward(call, out, stats, dout, dlse)


def reject_decoding(call: DecodeCall) -> str | None:
    reason = reject_query(call.query) or reject_query(call.value)
    if reason is not None:
        return reason
    group_size = call.query.shape[2] // call.slots.keys.shape[1]
    if group_size > 32:
        return f"{group_size} query heads per head of the slots are above 32"
    return _reject_float8(call.query.device) if call.slots.keys.dtype == NUMBERS else None


@functools.cache
def _reject_float8(device: torch.device) -> str | None:
    from flash_dmattn.backends.triton.float8 import FIRST_GPU

    capability = FIRST_GPU if is_interpreted() else torch.cuda.get_device_capability(device)
    if capability < FIRST_GPU:
        needed, found = (".".join(map(str, numbers)) for numbers in (FIRST_GPU, capability))
        return f"slots in float8_e4m3fn need compute capability {needed} or newer, this GPU has {found}"
    return None


def decode(call: DecodeCall) -> tuple[torch.Tensor, torch.Tensor]:
    """Changes the slots. Returns out (B, 1, H, Dv) and lse (B, H, 1) float32."""
    from flash_dmattn.backends.triton.decode_kernel import run_decode

    return run_decode(call)


def reject_order_statistics(sequence: torch.Tensor, low: torch.Tensor) -> str | None:
    if low.shape != sequence.shape:
        return "there is not one range per element"
    return f"{sequence.shape[0]} rows are above {MAX_LANES}" if sequence.shape[0] > MAX_LANES else None


def kth_smallest_in_ranges(sequence: torch.Tensor, low: torch.Tensor, high: torch.Tensor, k: int) -> torch.Tensor:
    from flash_dmattn.backends.triton import order_statistics

    return order_statistics.kth_smallest_in_ranges(sequence, low, high, k)


def reject_token_importance(value: torch.Tensor, *parameters: torch.Tensor | None) -> str | None:
    if value.shape[2] != 1 or value.stride(3) != 1:
        return "there is not one token of contiguous values"
    tensors = [value, *(parameter for parameter in parameters if parameter is not None)]
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return "there is no gradient"
    for tensor in tensors:
        if tensor.dtype == torch.float64 or tensor.device != value.device:
            return "not all tensors are on one device and of at most float32"
    return None


def token_importance(
    value: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, A: torch.Tensor, max_exponent: float | None
) -> torch.Tensor:
    from flash_dmattn.backends.triton.importance_kernel import run_importance

    return run_importance(value, weight, bias, A, max_exponent)


def reject_cut(call: CutCall) -> str | None:
    return _reject_tensor(call.importance) or reject_lanes(call.importance.shape[0] * call.importance.shape[1])


def cut(call: CutCall) -> tuple[torch.Tensor, ...]:
    """Returns score, threshold, contested_from, cut and scale, as the operator does."""
    from flash_dmattn.backends.triton.soft_cut import run_cut

    return run_cut(call)


def cut_backward(
    call: CutCall, cut: torch.Tensor, scale: torch.Tensor, dscore: torch.Tensor, dthreshold: torch.Tensor
) -> torch.Tensor:
    """Returns dimportance (B, Hi, Sk), in importance's dtype; equal inputs give bitwise equal results."""
    from flash_dmattn.backends.triton.soft_cut import run_cut_backward

    return run_cut_backward(call, cut, scale, dscore, dthreshold)


def reject_sinks(out: torch.Tensor, lse: torch.Tensor, sinks: torch.Tensor) -> str | None:
    if not lse.device == sinks.device == out.device:
        return "not all tensors are on one device"
    if torch.float64 in (lse.dtype, sinks.dtype):
        return "not all tensors are of at most float32"
    return reject_query(out)


def with_sinks(out: torch.Tensor, lse: torch.Tensor, sinks: torch.Tensor, result: torch.Tensor) -> None:
    from flash_dmattn.backends.triton.sink_logits import run_sinks

    run_sinks(out, lse, sinks, result)


def with_sinks_backward(
    dresult: torch.Tensor, out: torch.Tensor, lse: torch.Tensor, sinks: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns dout, dlse and dsinks; equal inputs give bitwise equal results."""
    from flash_dmattn.backends.triton.sink_logits import run_sinks_backward

    return run_sinks_backward(dresult, out, lse, sinks)


def empty_forward(query: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns out, lse and stats of queries that see nothing."""
    batch, seqlen_q, num_heads, _ = query.shape
    out = torch.zeros_like(query, memory_format=torch.contiguous_format)
    stats = torch.full((2, batch, num_heads, seqlen_q), torch.inf, device=out.device)
    return out, -stats[0], stats


def is_interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")
