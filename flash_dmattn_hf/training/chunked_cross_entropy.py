"""Cross-entropy of a linear output layer, a few tokens at a time: the (tokens, vocabulary) logits never exist.

A full copy of the logits of 131,072 tokens and a vocabulary of 128,256 takes 67 GB in float32. Here each chunk's logits
are made, turned into the chunk's share of the loss and of all gradients, and forgotten.
"""

import torch
import torch.nn.functional as F

from flash_dmattn_hf.training.output_layer import (
    apply_operations,
    check_output_layer,
    empty_gradients,
    precision_of,
    scale_gradients,
    tokens_per_chunk,
    undo_operations,
)

CHUNK_ENTRIES = 2**27
"""Logits made at once where the caller gives no chunk size; 512 MiB in float32."""


def chunked_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    operations: str = "",
    ignore_index: int = -100,
    chunk_size: int | None = None,
) -> torch.Tensor:
    """Returns the sum over the tokens of -log softmax(operations(hidden weight^T + bias))[label].

    hidden: (N, hidden size). weight: (vocabulary, hidden size). bias: (vocabulary,) or None. All of one dtype.
    labels: (N,) integers; tokens with the label `ignore_index` count for nothing, whatever their hidden state.
    operations: what happens to the logits before the softmax, comma-separated: "*x", "/x", "tanh", "float32".
    chunk_size: tokens per chunk; None: as many as make `CHUNK_ENTRIES` logits.

    The sum is in float32, in float64 for float64 inputs. Gradients of hidden, weight and bias are computed in the
    forward, chunk by chunk in the dtype of the inputs; those of weight and bias add up in float32. It cannot be
    differentiated twice.

    Raises ValueError for shapes or dtypes that do not fit.
    """
    size = _check(hidden, weight, labels, bias, operations, chunk_size)
    learns = torch.is_grad_enabled()
    wanted = [learns and tensor is not None and tensor.requires_grad for tensor in (hidden, weight, bias)]
    labels = labels.to(hidden.device)
    return _chunked_cross_entropy_op(hidden, weight, bias, labels, operations, ignore_index, size, *wanted)[0]


@torch.library.custom_op("flash_dmattn_hf::chunked_cross_entropy", mutates_args=())
def _chunked_cross_entropy_op(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    labels: torch.Tensor,
    operations: str,
    ignore_index: int,
    chunk_size: int,
    wants_hidden: bool,
    wants_weight: bool,
    wants_bias: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns the loss () and the gradients of hidden, weight and bias; one that is not wanted has no entries."""
    precision = precision_of(hidden.dtype)
    loss = hidden.new_zeros((), dtype=precision)
    dhidden = torch.empty_like(hidden if wants_hidden else hidden[:0])
    dweight = torch.zeros_like(weight if wants_weight else weight[:0], dtype=precision)
    dbias = hidden.new_zeros(weight.shape[0] if wants_bias else 0, dtype=precision)
    with torch.autocast(hidden.device.type, enabled=False):
        for start in range(0, hidden.shape[0], chunk_size):
            rows = slice(start, start + chunk_size)
            ignored = labels[rows] == ignore_index
            targets = labels[rows].masked_fill(ignored, 0).unsqueeze(1)
            tokens = hidden[rows].masked_fill(ignored.unsqueeze(1), 0)
            logits, steps = apply_operations(F.linear(tokens, weight, bias), operations)
            log_softmax = torch.log_softmax(logits, -1, dtype=precision)
            loss -= log_softmax.gather(1, targets).masked_fill(ignored.unsqueeze(1), 0).sum()
            if not (wants_hidden or wants_weight or wants_bias):
                continue
            dlogits = log_softmax.exp_()
            dlogits.scatter_add_(1, targets, -torch.ones_like(targets, dtype=precision))
            dlogits = undo_operations(dlogits, steps).to(hidden.dtype)
            if wants_hidden:
                dhidden[rows] = (dlogits @ weight).masked_fill_(ignored.unsqueeze(1), 0)
            if wants_weight:  # the tokens that are ignored are zero here
                dweight += dlogits.t() @ tokens
            if wants_bias:
                dbias += (~ignored).to(precision) @ dlogits.to(precision)
    return loss, dhidden, dweight.to(weight.dtype), dbias.to(weight.dtype)


@_chunked_cross_entropy_op.register_fake
def _(hidden, weight, bias, labels, operations, ignore_index, chunk_size, wants_hidden, wants_weight, wants_bias):
    return (
        hidden.new_empty((), dtype=precision_of(hidden.dtype)),
        *empty_gradients(hidden, weight, wants_hidden, wants_weight, wants_bias),
    )


def _setup_context(ctx, inputs, output) -> None:
    ctx.wanted = inputs[-3:]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[1:])


def _backward(ctx, dloss, *_):
    return *scale_gradients(ctx, dloss), *[None] * 7


_chunked_cross_entropy_op.register_autograd(_backward, setup_context=_setup_context)


def _check(hidden, weight, labels, bias, operations, chunk_size) -> int:
    """Returns the tokens per chunk."""
    check_output_layer(hidden, weight, bias, operations)
    if labels.shape != hidden.shape[:1]:
        raise ValueError(f"labels must have shape {tuple(hidden.shape[:1])}, got {tuple(labels.shape)}")
    return tokens_per_chunk(chunk_size, CHUNK_ENTRIES, weight.shape[0])
