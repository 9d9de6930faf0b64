"""KL divergence of a student's predictions from a teacher's, a few tokens at a time.

The logits of 32,768 tokens and a vocabulary of 128,256 take 17 GB in float32, once for the teacher and once for the
student. Here each chunk's logits are made from hidden states and output weights, turned into the chunk's share of the
loss and of all gradients, and forgotten.

Liger-Kernel's fused losses are not used: its JSD has no weights per token, no bias and no softcap.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from flash_dmattn_hf.training.divergence import find_divergences
from flash_dmattn_hf.training.output_layer import (
    apply_operations,
    check_output_layer,
    empty_gradients,
    precision_of,
    scale_gradients,
    tokens_per_chunk,
    undo_operations,
)

CHUNK_ENTRIES = 2**26
"""Logits of either model made at once where the caller gives no chunk size.

They take twice 128 MiB in bfloat16 on a GPU with Triton, five times 256 MiB in float32 where torch does the work.
"""


class Distillation(NamedTuple):
    """Means over the tokens, tensors (). Only the loss has a gradient.

    loss: KL(teacher || student) in nats per token, weighted. kld: the same, unweighted. top1: share of tokens with
    equal likeliest words. kld and top1 leave out tokens of weight 0.
    """

    loss: torch.Tensor
    kld: torch.Tensor
    top1: torch.Tensor


class TokenWeights(NamedTuple):
    """How much every token of a batch counts, and what the sums over them are divided by.

    own: (N,), of the tokens that are here. total, num_counted: (), the sum and number of weights above 0 of all tokens,
    of which others may be elsewhere.
    """

    own: torch.Tensor
    total: torch.Tensor
    num_counted: torch.Tensor


def chunked_distillation_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    teacher_hidden: torch.Tensor,
    teacher_weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    teacher_bias: torch.Tensor | None = None,
    *,
    operations: str = "",
    teacher_operations: str = "",
    token_weights: torch.Tensor | TokenWeights | None = None,
    chunk_size: int | None = None,
) -> Distillation:
    """Returns the mean over the tokens of KL(softmax(teacher's logits) || softmax(student's logits)).

    Logits are operations(hidden weight^T + bias), of the teacher with its own hidden size, dtype and operations.

    hidden: (N, hidden size). weight: (vocabulary, hidden size). bias: (vocabulary,) or None. All of one dtype.
    teacher_hidden, teacher_weight, teacher_bias: the same of the teacher, with the same N and vocabulary; no gradient.
    operations, teacher_operations: as in `chunked_cross_entropy`: "*x", "/x", "tanh", "float32".
    token_weights: (N,) floating point of at least 0, of which not all are 0; None: 1 for every token. Or
        `TokenWeights`, of which the total is not 0: the result is then the share of these tokens in the means of all.
    chunk_size: tokens per chunk; None: as many as make `CHUNK_ENTRIES` logits.

    Sums are in float32, in float64 for float64 inputs. Gradients of hidden, weight and bias are computed in the
    forward, chunk by chunk in the dtype of hidden; those of weight and bias add up in float32. The gradient of the
    logits is rounded to the dtype of hidden once, after it went back through the operations. It cannot be
    differentiated twice. Raises ValueError for shapes or dtypes that do not fit, such as another vocabulary.
    """
    check_output_layer(hidden, weight, bias, operations)
    check_output_layer(teacher_hidden, teacher_weight, teacher_bias, teacher_operations, "teacher_")
    if teacher_weight.shape[0] != weight.shape[0]:
        raise ValueError(
            f"the teacher must have the student's vocabulary of {weight.shape[0]}, got {teacher_weight.shape[0]}"
        )
    count = hidden.shape[0]
    if teacher_hidden.shape[0] != count:
        raise ValueError(f"teacher_hidden must have {count} tokens as hidden does, got {teacher_hidden.shape[0]}")
    divisors = None
    if isinstance(token_weights, TokenWeights):
        token_weights, *divisors = token_weights
    if token_weights is None:
        token_weights = hidden.new_ones(count, dtype=torch.float32)
    if token_weights.shape != (count,) or not token_weights.is_floating_point():
        raise ValueError(
            f"token_weights must be floating point of shape ({count},), got {token_weights.dtype} of shape "
            f"{tuple(token_weights.shape)}"
        )
    size = tokens_per_chunk(chunk_size, CHUNK_ENTRIES, weight.shape[0])
    learns = torch.is_grad_enabled()
    wanted = [learns and tensor is not None and tensor.requires_grad for tensor in (hidden, weight, bias)]
    token_weights = token_weights.detach().to(hidden.device, precision_of(hidden.dtype))
    teacher = [t if t is None else t.detach() for t in (teacher_hidden, teacher_weight, teacher_bias)]
    loss, kld, same = _distillation_op(
        hidden, weight, bias, *teacher, token_weights, operations, teacher_operations, size, *wanted
    )[:3]
    total, num_counted = divisors or (token_weights.sum(), (token_weights > 0).sum())
    return Distillation(loss / total, kld / num_counted, same / num_counted)


@torch.library.custom_op("flash_dmattn_hf::chunked_distillation", mutates_args=())
def _distillation_op(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    teacher_hidden: torch.Tensor,
    teacher_weight: torch.Tensor,
    teacher_bias: torch.Tensor | None,
    token_weights: torch.Tensor,
    operations: str,
    teacher_operations: str,
    chunk_size: int,
    wants_hidden: bool,
    wants_weight: bool,
    wants_bias: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns the sums over the tokens of weight times KL, of KL and of equal likeliest words, all (), and the
    gradients of hidden, weight and bias for the first of them; one that is not wanted has no entries."""
    precision = precision_of(hidden.dtype)
    loss, kld, same = (hidden.new_zeros((), dtype=precision) for _ in range(3))
    dhidden = torch.empty_like(hidden if wants_hidden else hidden[:0])
    dweight = torch.zeros_like(weight if wants_weight else weight[:0], dtype=precision)
    dbias = hidden.new_zeros(weight.shape[0] if wants_bias else 0, dtype=precision)
    wants_gradient = wants_hidden or wants_weight or wants_bias
    with torch.autocast(hidden.device.type, enabled=False):
        for start in range(0, hidden.shape[0], chunk_size):
            rows = slice(start, start + chunk_size)
            factors = token_weights[rows]
            tokens = hidden[rows].masked_fill(~(factors > 0)[:, None], 0)  # padding may hold anything
            expected, _ = apply_operations(
                F.linear(teacher_hidden[rows], teacher_weight, teacher_bias), teacher_operations
            )
            logits, steps = apply_operations(F.linear(tokens, weight, bias), operations)
            found = find_divergences(expected, logits, factors, wants_gradient=wants_gradient, may_overwrite=not steps)
            del expected, logits  # the next chunk's take their memory
            same = same + found.is_same.sum()
            kld = kld + found.nats.sum()
            loss = loss + found.nats @ factors
            if not wants_gradient:
                continue
            dlogits = undo_operations(found.gradient, steps).to(hidden.dtype)
            if wants_hidden:
                dhidden[rows] = dlogits @ weight
            if wants_weight:
                dweight += dlogits.t() @ tokens
            if wants_bias:
                dbias += dlogits.sum(0, dtype=precision)
            del found, steps, dlogits
    return loss, kld, same, dhidden, dweight.to(weight.dtype), dbias.to(weight.dtype)


@_distillation_op.register_fake
def _(hidden, weight, bias, th, tw, tb, factors, operations, to, size, wants_hidden, wants_weight, wants_bias):
    sums = (hidden.new_empty((), dtype=precision_of(hidden.dtype)) for _ in range(3))
    return (
        *sums,
        *empty_gradients(hidden, weight, wants_hidden, wants_weight, wants_bias),
    )


def _setup_context(ctx, inputs, output) -> None:
    ctx.wanted = inputs[-3:]
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:3])
    ctx.save_for_backward(*output[3:])


def _backward(ctx, dloss, *_):
    return *scale_gradients(ctx, dloss), *[None] * 10


_distillation_op.register_autograd(_backward, setup_context=_setup_context)
