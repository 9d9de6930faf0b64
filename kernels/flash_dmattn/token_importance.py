"""The importance of single tokens in one launch: while decoding, its handful of small operations would cost more."""

import torch

from flash_dmattn.backends import triton
from flash_dmattn.dispatch import TOKEN_IMPORTANCE, can_call_directly, find


def can_fuse(value: torch.Tensor, *parameters: torch.Tensor | None) -> bool:
    """Whether `token_importance` serves: one token on a GPU, no gradient, no float64, nothing compiled around it.

    A compiler fuses the operations itself.
    """
    if torch.compiler.is_compiling():
        return False
    return find(TOKEN_IMPORTANCE, value.device, value, *parameters) is not None


def token_importance(
    value: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    A: torch.Tensor,
    max_exponent: float | None,
) -> torch.Tensor:
    """Returns A * softplus(weight @ concat_h v + bias), or its exponential, (B, Hi, 1) float32.

    value: (B, Hkv, 1, D). weight: (Hi, Hkv * D). bias: (Hi,) or None. A: (Hi,).
    max_exponent: where the exponent is clamped before exp; None leaves exp out.
    """
    run = _run if can_call_directly(value, weight, bias, A) else token_importance_op
    return run(value, weight, bias, A, max_exponent)


def _run(value, weight, bias, A, max_exponent) -> torch.Tensor:
    with torch.cuda.device_of(value):
        return triton.token_importance(value, weight, bias, A, max_exponent)


@torch.library.custom_op("flash_dmattn::token_importance", mutates_args=())
def token_importance_op(
    value: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    A: torch.Tensor,
    max_exponent: float | None,
) -> torch.Tensor:
    """`token_importance` as an operator."""
    return _run(value, weight, bias, A, max_exponent)


@token_importance_op.register_fake
def _(value, weight, bias, A, max_exponent):
    return value.new_empty((value.shape[0], weight.shape[0], 1), dtype=torch.float32)
