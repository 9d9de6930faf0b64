"""FlexAttention of torch: compiled on a GPU, plain on a CPU, where it has no backward. Taken only by name."""

import functools
import math

import torch

from flash_dmattn.calls import AttentionCall, DenseCall

AUTOMATIC_ON = ()

_LARGEST = torch.finfo(torch.float32).max


@functools.cache
def why_unavailable() -> str | None:
    try:
        from torch.nn.attention import flex_attention  # noqa: F401
    except ImportError as error:
        return f"torch.nn.attention.flex_attention cannot be imported ({error})"
    return None


def reject(call: AttentionCall | DenseCall) -> str | None:
    if isinstance(call, AttentionCall) and call.soft is not None:
        return "it has no soft selection"
    if isinstance(call, AttentionCall) and call.dropout_seed is not None:
        return "it has no dropout"
    tensors = [call.query, call.key, call.value]
    tensors.append(call.attn_bias if isinstance(call, DenseCall) else call.importance)
    needs_gradient = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
    if call.query.device.type == "cpu" and needs_gradient:
        return "FlexAttention has no backward on the CPU"
    if call.query.device.type != "cpu" and call.query.dtype == torch.float64:
        return "FlexAttention has no float64 on a GPU"
    if call.deterministic and needs_gradient:
        return "FlexAttention has no deterministic backward"
    if call.query.numel() == 0 or call.key.numel() == 0:
        return "FlexAttention takes no empty tensors"
    return None


def attend(call: AttentionCall | DenseCall) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns out (B, Sq, H, D) and lse (B, H, Sq) float32, differentiable by torch."""
    if isinstance(call, DenseCall):
        is_visible, add_bias, batch, heads = _of_masks(call)
    else:
        is_visible, add_bias, batch, heads = _of_intervals(call.with_comparable_importance())
    tensors = (call.query, call.key, call.value)
    if not torch.is_grad_enabled():  # on a CPU it refuses tensors that merely ask for gradients
        tensors = (tensor.detach() for tensor in tensors)
    query, key, value = (tensor.transpose(1, 2) for tensor in tensors)
    block_mask = _create_block_mask(is_visible, batch, heads, query.shape[2], key.shape[2], query.device)

    def score(score, batch, head, row, column):
        if call.softcap > 0:
            score = call.softcap * torch.tanh(score / call.softcap)
        return score if add_bias is None else add_bias(score, batch, head, row, column)

    from torch.nn.attention.flex_attention import AuxRequest

    biases = call.attn_bias if isinstance(call, DenseCall) else call.importance
    biases_need_gradient = biases is not None and biases.requires_grad
    run = _compiled() if query.device.type == "cuda" else _flex_attention()
    with torch.autocast(query.device.type, enabled=False):
        out, auxiliary = run(
            query,
            key,
            value,
            score_mod=score,
            block_mask=block_mask,
            scale=call.softmax_scale,
            enable_gqa=query.shape[1] != key.shape[1],
            return_aux=AuxRequest(lse=True),
            kernel_options={"bwd_num_stages": 1} if biases_need_gradient else None,  # else no room in shared memory
        )
    return out.transpose(1, 2), auxiliary.lse


def _of_masks(call: DenseCall):
    """Returns mask function, bias function or None, and the batch and heads that the mask needs, None for all alike."""
    mask, offset = call.attn_mask, call.key.shape[1] - call.query.shape[1]
    num_heads = call.query.shape[2]
    see = None if mask is None else _reader(mask != 0, num_heads)

    def is_visible(batch, head, row, column):
        visible = column <= row + offset if call.is_causal else column >= 0
        return visible if see is None else visible & see(batch, head, row, column)

    if call.attn_bias is None:
        add_bias = None
    else:
        read = _reader(call.attn_bias, num_heads)

        def add_bias(score, batch, head, row, column):
            bias = read(batch, head, row, column).to(torch.float32)
            return score + torch.where(bias.isnan(), -math.inf, bias).clamp(max=_LARGEST)

    batch = None if mask is None or mask.shape[0] == 1 else call.query.shape[0]
    heads = None if mask is None or mask.shape[1] == 1 else num_heads
    return is_visible, add_bias, batch, heads


def _of_intervals(call: AttentionCall):
    birth, death = call.intervals()
    rows = call.query_rows()
    group = call.query.shape[2] // call.num_interval_heads
    importance = call.importance

    def is_visible(batch, head, row, column):
        place = rows[batch, row]
        lane = head // group
        return (place >= 0) & (birth[batch, lane, column] <= place) & (place < death[batch, lane, column])

    def add_importance(score, batch, head, row, column):
        return score + importance[batch, head // group, column]

    batch, _, num_heads, _ = call.query.shape
    return is_visible, None if importance is None else add_importance, batch, num_heads


def _reader(tensor: torch.Tensor, num_heads: int):
    """Returns a function that reads a broadcast (B, H, Sq, Sk) tensor."""
    batches, heads, rows, columns = (size > 1 for size in tensor.shape)
    group = num_heads // tensor.shape[1]

    def read(batch, head, row, column):
        return tensor[
            batch if batches else 0,
            head // group if heads else 0,
            row if rows else 0,
            column if columns else 0,
        ]

    return read


def _flex_attention():
    from torch.nn.attention.flex_attention import flex_attention

    return flex_attention


@functools.cache
def _compiled():
    return torch.compile(_flex_attention())


def _create_block_mask(is_visible, batch, heads, seqlen_q: int, seqlen_k: int, device: torch.device):
    from torch.nn.attention.flex_attention import create_block_mask

    is_compiled = device.type == "cuda"  # else it writes the whole mask down first
    return create_block_mask(is_visible, batch, heads, seqlen_q, seqlen_k, device=str(device), _compile=is_compiled)
