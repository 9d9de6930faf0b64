"""Liger-Kernel's fused linear cross-entropy, where it is installed and can compute what a model asks for."""

import importlib.util
import re

import torch

SOFTCAP = re.compile(r"(?:float32,)?/([\d.e+-]+),tanh,\*\1")


def is_installed() -> bool:
    return importlib.util.find_spec("liger_kernel") is not None


def reject(hidden: torch.Tensor, operations: str) -> str | None:
    """Says why Liger-Kernel cannot serve, None if it can. operations: as in `chunked_cross_entropy`."""
    if not is_installed():
        return "liger-kernel is not installed"
    if hidden.device.type != "cuda":
        return f"its kernels run on a GPU, not on {hidden.device.type}"
    if hidden.dtype == torch.float64:
        return "it computes in float32"
    if operations not in ("", "float32") and SOFTCAP.fullmatch(operations) is None:
        return f"it knows a softcap of the logits, not {operations}"
    return None


def cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    bias: torch.Tensor | None,
    operations: str,
    ignore_index: int,
) -> torch.Tensor:
    """The sum that `chunked_cross_entropy` returns; gradients of weight and bias add up in float32."""
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    softcap = SOFTCAP.fullmatch(operations)
    return liger_fused_linear_cross_entropy(
        hidden,
        weight,
        labels,
        bias,
        ignore_index=ignore_index,
        reduction="sum",
        softcap=float(softcap[1]) if softcap else None,
        accum_dtype=torch.float32,
    )
