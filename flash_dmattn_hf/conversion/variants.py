"""Temporary changes to a converted model, for comparisons; every one is undone when its block ends."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import nn

from flash_dmattn_hf.config import SECTION, DynamicMaskConfig
from flash_dmattn_hf.gates.attach import iter_gates, text_config_of
from flash_dmattn_hf.names import DENSE_ON_RANKS, NAMES, is_ours
from flash_dmattn_hf.parallel.context import active


@contextmanager
def with_window(
    model: nn.Module,
    keep_window_size: int,
    *,
    num_sink_tokens: int | None = None,
    local_window_size: int | None = None,
) -> Iterator[None]:
    """Inside the block the model keeps another number of keys; its weights stay.

    num_sink_tokens: None keeps the model's. local_window_size: None keeps the model's share of the window.
    Raises ValueError for a model without gates or sizes that do not fit.
    """
    gates = [gate for _, _, gate in _gates(model)]
    before = [gate.config for gate in gates]
    after = [_resize(config, keep_window_size, num_sink_tokens, local_window_size) for config in before]
    text_config = text_config_of(model)
    section = getattr(text_config, SECTION, None)
    try:
        for gate, config in zip(gates, after, strict=True):
            gate.config = config
        if section is not None:
            setattr(text_config, SECTION, after[0].to_dict())
        yield
    finally:
        for gate, config in zip(gates, before, strict=True):
            gate.config = config
        if section is not None:
            setattr(text_config, SECTION, section)


@contextmanager
def without_importance(model: nn.Module) -> Iterator[None]:
    """Inside the block A is 0: all keys tie, so the model sees its sinks and the newest keys of its window."""
    parameters = [getattr(gate, "A", None) for _, _, gate in _gates(model)]
    parameters = [
        module.A if A is None else A for A, (_, module, _) in zip(parameters, _gates(model), strict=True)
    ]
    before = [parameter.detach().clone() for parameter in parameters]
    try:
        with torch.no_grad():
            for parameter in parameters:
                parameter.zero_()
        yield
    finally:
        with torch.no_grad():
            for parameter, values in zip(parameters, before, strict=True):
                parameter.copy_(values)


@contextmanager
def dense(model: nn.Module) -> Iterator[None]:
    """Inside the block the model attends to every key, through transformers' own default implementation.

    Where a `context_parallel` block is active already, to those of all ranks, through ours: without gradients.
    """
    text_config = text_config_of(model)
    before = text_config._attn_implementation
    # some versions of transformers would choose sdpa here, which drops the softcap
    has_softcap = getattr(text_config, "attn_logit_softcapping", None) is not None
    if active.slot.content is not None:
        name = DENSE_ON_RANKS
    else:
        name = "eager" if has_softcap else model.get_correct_attn_implementation(None)
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def _resize(config: DynamicMaskConfig, window: int, sinks: int | None, local: int | None) -> DynamicMaskConfig:
    if sinks is None:
        sinks = min(config.num_sink_tokens, window)
    if local is None:
        local = min(config.local_window_size * window // config.keep_window_size, window - sinks)
    return replace(config, keep_window_size=window, num_sink_tokens=sinks, local_window_size=local)


def _gates(model: nn.Module) -> list:
    gates = list(iter_gates(model))
    if not gates or not is_ours(text_config_of(model)._attn_implementation):
        raise ValueError(
            f'model must be converted and use attn_implementation="{NAMES[0]}", got {type(model).__name__} '
            f"with {text_config_of(model)._attn_implementation}"
        )
    return gates
