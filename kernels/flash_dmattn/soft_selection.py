"""Soft selection: the cut of a top-K selection as a gate with a slope, so that training can move keys across it.

A key that is neither a sink nor inside the local window of row t is contested there. Of the contested keys the K most
important are kept. Between the best that is evicted and the worst that is kept lies the threshold theta_t, and with a
temperature the cut there becomes

    gate(t, j) = log sigmoid((importance_j - theta_t) / (temperature * sd)),

sd the standard deviation of the importance over the sequence. As the temperature falls the gate becomes the hard mask.
"""

import math

import torch

from flash_dmattn import soft_cut
from flash_dmattn.calls import CutCall
from flash_dmattn.dispatch import SOFT_CUT, can_call_directly, prefer
from flash_dmattn.operators import (
    EagerFunction,
    define_gradient,
    define_operator,
    first_derivative,
    run_slices,
    spread_gradients,
)
from flash_dmattn.selection import select_visible
from flash_dmattn.visibility import SoftCut


def num_visible(keep_window_size: int, num_sink_tokens: int, local_window_size: int, band: float) -> int:
    """Returns how many keys a row of a soft selection sees at most: sinks, local window, ceil(band * K) others."""
    exempt = num_sink_tokens + local_window_size
    # Rounded, because 1.1 * 10 is above 11 in floating point.
    return exempt + math.ceil(round(band * (keep_window_size - exempt), 6))


def cut_softly(
    importance: torch.Tensor,
    death: torch.Tensor,
    temperature: float | torch.Tensor,
    seqlen_q: int,
    keep_window_size: int,
    num_sink_tokens: int,
    local_window_size: int,
    padding_mask: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    backend: str = "auto",
    contested_from: torch.Tensor | None = None,
) -> SoftCut:
    """Returns the gate of a causal top-K selection for the last seqlen_q rows.

    importance: (B, Hi, Sk) floating point. death: (B, Hi, Sk) int32, what `select_visible` returns for it and the
    arguments below, without a sliding window. temperature: in standard deviations of the importance, above 0; a tensor
    () gets no gradient. backend: the name of one that does it where it can. contested_from: (B, Hi, Sk) int32, the
    first row at which a key competes, even before its own; None: as the windows say. At most one key may die at a row.
    """
    exempt = num_sink_tokens + local_window_size
    if contested_from is not None:
        contested_from = contested_from.contiguous()
    elif padding_mask is not None and exempt > 0:
        contested_from = select_visible(
            importance,
            keep_window_size=exempt,
            num_sink_tokens=num_sink_tokens,
            local_window_size=local_window_size,
            padding_mask=padding_mask,
            cu_seqlens=cu_seqlens,
        ).death
    is_fixed = not isinstance(temperature, torch.Tensor)
    call = CutCall(
        importance=importance,
        death=death,
        contested_from=contested_from,
        padding_mask=None if padding_mask is None else padding_mask.contiguous(),
        cu_seqlens=None if cu_seqlens is None else cu_seqlens.contiguous(),
        temperature=None if is_fixed else temperature,
        fixed_temperature=float(temperature) if is_fixed else 1.0,
        seqlen_q=seqlen_q,
        num_sink_tokens=num_sink_tokens,
        local_window_size=local_window_size,
        has_kept_keys=keep_window_size > exempt,
    )
    score, threshold, contested_from, *_ = _run(*call.flatten(), backend)
    return SoftCut(score, threshold, contested_from)


def _cut(*arguments) -> tuple[torch.Tensor, ...]:
    """Returns score, threshold and contested_from of a `SoftCut`, given a `CutCall` and a backend's name; and

    cut: (2, B, Hi, Sq) int32, the best evicted key and the worst kept one of each query, between which its threshold
        lies; -1 where there is none, or the threshold is -inf.
    scale: (B, Hi, docs) float64, what a document's importance is multiplied by.

    The two are for the backward and have no gradient.
    """
    call = CutCall.unflatten(arguments)
    with torch.cuda.device_of(call.importance):  # a kernel runs on the current device, whatever its tensors are on
        return _backend(call, arguments[-1]).cut(call)


def _cut_backward(dscore, dthreshold, cut, scale, *arguments) -> torch.Tensor:
    """Returns dimportance (B, Hi, Sk), in importance's dtype; an importance that is not finite has gradient 0."""
    call = CutCall.unflatten(arguments)
    with torch.cuda.device_of(call.importance):
        return _backend(call, arguments[-1]).cut_backward(call, cut, scale, dscore, dthreshold)


def _backend(call: CutCall, name: str):
    return prefer(SOFT_CUT, name, call.importance.device, call) or soft_cut


def _fake_cut(*arguments) -> tuple[torch.Tensor, ...]:
    call = CutCall.unflatten(arguments)
    importance, lanes, precision = call.importance, call.importance.shape[:2], _precision(call.importance)
    return (
        importance.new_empty(importance.shape, dtype=precision),
        importance.new_empty((*lanes, call.seqlen_q), dtype=precision),
        importance.new_empty(importance.shape, dtype=torch.int32),
        importance.new_empty((2, *lanes, call.seqlen_q), dtype=torch.int32),
        importance.new_empty((*lanes, call.num_documents), dtype=torch.float64),
    )


def _fake_cut_backward(dscore, dthreshold, cut, scale, importance, *_) -> torch.Tensor:
    return torch.empty_like(importance, memory_format=torch.contiguous_format)


def _setup_context(ctx, inputs, output) -> None:
    *_, contested_from, cut, scale = output
    ctx.mark_non_differentiable(contested_from, cut, scale)
    ctx.set_materialize_grads(False)  # else zeros are launched for these three
    ctx.save_for_backward(cut, scale, *inputs[: CutCall.num_tensors])
    ctx.options = inputs[CutCall.num_tensors :]


def _backward(ctx, dscore, dthreshold, *_):
    saved = cut, _, importance, *_ = ctx.saved_tensors  # read once, as checkpointing demands
    if dscore is None:
        dscore = importance.new_zeros(importance.shape, dtype=_precision(importance))
    if dthreshold is None:
        dthreshold = importance.new_zeros(cut.shape[1:], dtype=_precision(importance))
    tensors = (dscore, dthreshold, *saved)
    run = _cut_backward if can_call_directly(*tensors) else _first_derivative
    return spread_gradients(ctx, CutCall, (run(*tensors, *ctx.options),))


def _precision(importance: torch.Tensor) -> torch.dtype:
    return torch.float64 if importance.dtype == torch.float64 else torch.float32


def _first_derivative(*arguments) -> torch.Tensor:
    return first_derivative(soft_cut_backward_op, *arguments)


soft_cut_op = define_operator("soft_cut", CutCall, _cut, _fake_cut, num_outputs=5)
soft_cut_backward_op = define_operator(
    "soft_cut_backward",
    CutCall,
    _cut_backward,
    _fake_cut_backward,
    num_outputs=1,
    before=dict.fromkeys(("dscore", "dthreshold", "cut", "scale"), torch.Tensor),
)
define_gradient("soft_cut", _backward, _setup_context)


class _EagerCut(EagerFunction):
    """The operator with its gradient, past the autograd of torch.library, as that of attention."""

    @staticmethod
    def forward(*arguments):
        return _without_gradient(arguments)

    setup_context = staticmethod(_setup_context)
    backward = staticmethod(_backward)

    @staticmethod
    def vmap(info, in_dims, *arguments):
        return run_slices(_run, info, in_dims, arguments)


def _run(*arguments) -> tuple[torch.Tensor, ...]:
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return _EagerCut.apply(*arguments)
    return _without_gradient(arguments)


def _without_gradient(arguments: tuple) -> tuple[torch.Tensor, ...]:
    direct = can_call_directly(*arguments[: CutCall.num_tensors])
    return _cut(*arguments) if direct else soft_cut_op(*arguments)
