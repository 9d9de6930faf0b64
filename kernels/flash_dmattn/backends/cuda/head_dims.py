"""Head dims that the CUDA library has no kernel for: rows are filled up with zeros to those of the next larger one.

Zeros add nothing to a dot product, and what stands in their place in `out` and in the gradients is cut off. The copies
live as long as a pass: what is saved for the backward are the caller's own rows.
"""

from dataclasses import replace

import torch

from flash_dmattn.backends.cuda import library
from flash_dmattn.calls import AttentionCall


def kernel_dim(head_dim: int) -> int | None:
    """Returns the head dim of the kernels for rows of this one: the least that is no smaller, up to twice as large.

    None where there is none. Kernels of more than twice the head dim would multiply mostly zeros.
    """
    return min((built for built in library.head_dims() if head_dim <= built <= 2 * head_dim), default=None)


def is_filled_up(call: AttentionCall) -> bool:
    """Whether kernels read copies of a call's rows."""
    return kernel_dim(call.query.shape[3]) != call.query.shape[3]


def fill_up(call: AttentionCall) -> AttentionCall:
    """Returns the call with rows as kernels read them; its softmax_scale stays."""
    return replace(call, query=fill_rows(call.query), key=fill_rows(call.key), value=fill_rows(call.value))


def fill_rows(tensor: torch.Tensor) -> torch.Tensor:
    """Returns (B, S, heads, D) with zeros behind every row, (B, S, heads, kernel_dim(D)); not differentiable."""
    head_dim = tensor.shape[3]
    filled = tensor.new_empty(*tensor.shape[:3], kernel_dim(head_dim))
    filled[..., :head_dim] = tensor
    filled[..., head_dim:] = 0
    return filled


def cut_rows(tensor: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Returns the first `head_dim` numbers of every row, contiguous."""
    return tensor[..., :head_dim].contiguous()
