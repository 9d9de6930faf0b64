"""Loading on several ranks, as `DistributedConfig` of transformers says: the gates are split like their layers."""

import dataclasses
import functools
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
import torch.distributed as dist
import transformers
from torch import nn
from transformers.integrations.tensor_parallel import ALL_PARALLEL_STYLES

from flash_dmattn_hf.gates.attach import iter_gates
from flash_dmattn_hf.gates.importance import ImportanceGate
from flash_dmattn_hf.parallel.failures import Failures
from flash_dmattn_hf.parallel.tensor import STYLE, GateParallel, initialize_on_ranks, rules_of_gates
from flash_dmattn_hf.versions import FIRST_MESH, can_share_twice


def wrap_distribute(original: Callable) -> Callable:
    """Adds the gates of a model to its tensor parallel plan, before transformers splits the model.

    The replacement raises ValueError for gates that cannot be split, and for pipeline parallelism.
    """

    @functools.wraps(original)
    def maybe_distribute_model(cls, model, distributed_config, mesh):
        gates = [gate for _, _, gate in iter_gates(model)]
        if mesh is None or not gates:
            return original(cls, model, distributed_config, mesh)
        if distributed_config.pp_size > 1:
            raise ValueError(
                f"pp_size must be 1 with flash_dmattn, got {distributed_config.pp_size}: a stage of a pipeline lacks "
                "the layers that a DynamicMaskCache counts on"
            )
        if distributed_config.tp_size > 1 and distributed_config.fsdp_size > 1 and not can_share_twice():
            raise ValueError(
                f"fsdp_size beside tp_size needs transformers {FIRST_MESH} or newer with flash_dmattn, got "
                f"{transformers.__version__}"
            )
        for gate in gates:
            gate.is_on_ranks = True
        if distributed_config.tp_size > 1:
            distributed_config = _with_gates(model, distributed_config)
        model = original(cls, model, distributed_config, mesh)
        if distributed_config.tp_size > 1:
            model.forward = MethodType(_watched(model.forward.__func__), model)
        return model

    return maybe_distribute_model


def _with_gates(model: nn.Module, distributed_config: Any) -> Any:
    """Puts the rules of the gates where transformers looks for rules; returns the config to go on with."""
    given = distributed_config.tp_plan
    if not isinstance(given, dict):
        model._tp_plan = {**rules_of_gates(model, model.tp_plan, distributed_config.tp_size), **model.tp_plan}
        return distributed_config
    # Where transformers resolves plans, as 5.23 does, what a user gives changes single rules, unless it is empty. In
    # 5.17 it is the whole plan.
    is_merged = hasattr(model, "_resolve_parallel_plans") and given
    rules = rules_of_gates(model, {**model.tp_plan, **given} if is_merged else given, distributed_config.tp_size)
    return dataclasses.replace(distributed_config, tp_plan={**rules, **given})


def _watched(forward: Callable) -> Callable:
    """Returns a forward whose error on one rank is the reason that the others give for theirs."""

    @functools.wraps(forward)
    def watched(*args, **kwargs):
        if torch.compiler.is_compiling():
            return forward(*args, **kwargs)
        failures = Failures("tensor parallelism", dist.group.WORLD)  # of this forward: later ones have other reasons
        try:
            with failures.watching():
                return forward(*args, **kwargs)
        except Exception as error:
            failures.report(error)
            raise

    return watched


def initialize(gate: ImportanceGate) -> None:
    """Initialises what no checkpoint has given of a gate, alike on all ranks that load the model together."""
    if gate.is_on_ranks:
        initialize_on_ranks(gate)
    else:
        gate.initialize()


def register_style() -> None:
    """Makes the style of gates known to transformers."""
    ALL_PARALLEL_STYLES.register(STYLE, GateParallel())


def unregister_style() -> None:
    """Undoes `register_style`."""
    ALL_PARALLEL_STYLES._global_mapping.pop(STYLE, None)
