"""Temporary changes to a converted model, for comparisons; every one is undone when its block ends."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

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
    """Inside the block the model keeps another number of keys; its weights stay, and so do its window_shares.

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
    before = _implementations_of(model)
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
        _set_implementations(before)


def dense_switch(model: nn.Module) -> Callable[[], AbstractContextManager]:
    """Returns `dense` of this model for blocks that are entered often: what has to change is found out once."""
    found: dict[bool, list[tuple[PreTrainedConfig, str]]] = {}

    @contextmanager
    def switched() -> Iterator[None]:
        is_split = active.slot.content is not None
        if is_split not in found:
            with dense(model):
                found[is_split] = _implementations_of(model)
        before = [(config, config._attn_implementation) for config, _ in found[is_split]]
        _set_implementations(found[is_split])
        try:
            yield
        finally:
            _set_implementations(before)

    return switched


def _implementations_of(model: nn.Module) -> list[tuple[PreTrainedConfig, str]]:
    """Returns every config in a model, those of its parts included, with the attention implementation it names."""
    configs = [module.config for module in model.modules() if isinstance(module, PreTrainedModel)]
    for config in configs:  # which grows: parts of parts
        parts = [getattr(config, name, None) for name in config.sub_configs]
        configs += [part for part in parts if part is not None and not any(part is other for other in configs)]
    return [(config, config._attn_implementation) for config in configs]


def _set_implementations(implementations: list[tuple[PreTrainedConfig, str]]) -> None:
    for config, name in implementations:
        config._attn_implementation_internal = name  # the public name would set the parts of a config, too


def _resize(config: DynamicMaskConfig, window: int, sinks: int | None, local: int | None) -> DynamicMaskConfig:
    room = config.without_places(window).smallest_window
    if sinks is None:
        sinks = min(config.num_sink_tokens, room)
    if local is None:
        local = min(config.local_window_size * window // config.keep_window_size, room - sinks)
    return replace(config, keep_window_size=window, num_sink_tokens=sinks, local_window_size=local)


def _gates(model: nn.Module) -> list:
    gates = list(iter_gates(model))
    if not gates or not is_ours(text_config_of(model)._attn_implementation):
        raise ValueError(
            f'model must be converted and use attn_implementation="{NAMES[0]}", got {type(model).__name__} '
            f"with {text_config_of(model)._attn_implementation}"
        )
    return gates
