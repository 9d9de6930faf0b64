"""KL divergence of every token's prediction from a teacher's, and its gradient: one kernel on a GPU, else torch."""

from typing import NamedTuple

import torch

from flash_dmattn.backends import triton


class Divergences(NamedTuple):
    """What is found for the tokens of a chunk. It is 0 for a token whose factor is not above 0, whatever it holds.

    nats: (rows,), KL(teacher || student), in the dtype of the factors. is_same: (rows,), whether the likeliest words
    are equal, integer or bool. gradient: (rows, vocabulary), of the sum of factor * nats, for the student's logits.
    """

    nats: torch.Tensor
    is_same: torch.Tensor
    gradient: torch.Tensor | None


def find_divergences(
    expected: torch.Tensor, logits: torch.Tensor, factors: torch.Tensor, *, wants_gradient: bool, may_overwrite: bool
) -> Divergences:
    """Compares softmax(logits) with the teacher's softmax(expected).

    A word of probability 0 for the teacher counts for nothing, even if both logits are -inf. Of words with the largest
    logit, the first is the likeliest. NaN in a token that counts makes its nats and its gradient NaN.

    expected, logits: (rows, vocabulary), each of its own dtype. factors: (rows,) float32 or float64.
    wants_gradient: False: the gradient is None.
    may_overwrite: whether the kernel may write the gradient over logits that are contiguous, rounded to their dtype.
        That is right only where the gradient need not go back through an operation on the logits, before which it
        would be rounded. Else it is in the dtype of the factors, as it always is from torch.

    Softmax, sums and gradient are computed in the dtype of the factors.
    """
    if not _is_for_kernel(expected, logits, factors):
        return _find_with_torch(expected, logits, factors, wants_gradient)
    from flash_dmattn_hf.training.divergence_kernel import run_divergence

    gradient = None
    if wants_gradient:
        overwrites = may_overwrite and logits.is_contiguous()
        gradient = logits if overwrites else torch.empty(logits.shape, dtype=factors.dtype, device=logits.device)
    with torch.cuda.device_of(logits):
        return Divergences(*run_divergence(expected, logits, factors, gradient), gradient)


def _is_for_kernel(expected: torch.Tensor, logits: torch.Tensor, factors: torch.Tensor) -> bool:
    """Whether the kernel serves: on a GPU, with Triton installed, and in at most float32."""
    if logits.device.type != "cuda" or triton.why_unavailable() is not None:
        return False
    return factors.dtype == torch.float32 and {expected.dtype, logits.dtype} <= set(triton.DTYPES)


def _find_with_torch(
    expected: torch.Tensor, logits: torch.Tensor, factors: torch.Tensor, wants_gradient: bool
) -> Divergences:
    counted = factors > 0
    is_same = counted & (expected.argmax(-1) == logits.argmax(-1))
    expected = torch.log_softmax(expected, -1, dtype=factors.dtype)
    found = torch.log_softmax(logits, -1, dtype=factors.dtype)
    probability = expected.exp()
    nats = expected.sub_(found).mul_(probability).masked_fill_(probability == 0, 0).sum(-1)
    gradient = None
    if wants_gradient:
        gradient = found.exp_().sub_(probability).mul_(factors[:, None]).masked_fill_(~counted[:, None], 0)
    return Divergences(nats.masked_fill(~counted, 0), is_same, gradient)
