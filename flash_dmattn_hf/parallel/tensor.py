"""Tensor parallelism: every rank holds some heads of an attention module, and what its gate says about them.

transformers splits the values of a token by head, but dt of one head needs those of all heads. So each rank projects
its own values with the columns of dt_proj.weight that belong to them. The sum over the ranks is dt, and each rank gets
that of its own heads.
"""

import functools
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from transformers.distributed.sharding_utils import DtensorShardOperation
from transformers.integrations.tensor_parallel import TensorParallelLayer, replace_layer_number_by_wildcard

from flash_dmattn_hf.gates.attach import iter_gates
from flash_dmattn_hf.gates.importance import ImportanceGate, compute_importance
from flash_dmattn_hf.names import GATE_NAME
from flash_dmattn_hf.parallel.collectives import all_gather, reduce_scatter

STYLE = "flash_dmattn_gate"
"""The name of `GateParallel` in a tensor parallel plan of transformers."""

_VALUE_PROJECTIONS = ("v_proj", "kv_b_proj", "qkv_proj", "query_key_value", "k_proj")
"""Names of the projection whose output holds the values, the first that a module has."""


class GateParallel(TensorParallelLayer):
    """The style of a gate whose attention module is split by head.

    Only the columns of dt_proj.weight are split, as a DTensor, and only where they belong to values. The rest is small:
    every rank keeps all of it, uses what belongs to its heads, and sums the gradients over the ranks.
    """

    def install_forward(self, module: ImportanceGate, mesh: DeviceMesh) -> ImportanceGate:
        config = module.config
        ranks = _Ranks(mesh.get_group(), config.importance_heads == "shared", config.importance_input == "value")
        module.num_kv_heads //= mesh.size()
        if not ranks.is_shared:
            module.num_importance_heads //= mesh.size()
        if ranks.reads_values:
            module.source_shape = (module.num_kv_heads, module.head_dim)
            whole = module.dt_proj.weight
            columns = distribute_tensor(whole, mesh, [Shard(1)], src_data_rank=None)  # it has no values yet
            module.dt_proj.weight = nn.Parameter(columns, requires_grad=whole.requires_grad)
        module.dt_proj.forward = functools.partial(_project, module.dt_proj, ranks)
        module.forward = functools.partial(_compute, module, ranks)
        return module


class _Ranks(NamedTuple):
    """The group that shares a gate. is_shared: whether the gate has one importance for all heads. reads_values: whether
    it reads values, of which every rank has those of its heads, or hidden states, which all have."""

    group: dist.ProcessGroup
    is_shared: bool
    reads_values: bool

    def own(self, parameter: torch.Tensor) -> torch.Tensor:
        """Returns what belongs to the heads of this rank of a parameter (importance heads, ...) that all ranks have."""
        if self.is_shared:
            return parameter
        return _SumOfGradients.apply(parameter, self.group).chunk(self.group.size())[self.group.rank()]


def _project(projection: nn.Module, ranks: _Ranks, tokens: torch.Tensor) -> torch.Tensor:
    """tokens: (..., features), of this rank's values or of hidden states. Returns dt (..., heads) of its heads."""
    dtype = tokens.dtype
    bias = None if projection.bias is None else ranks.own(projection.bias).to(dtype)
    if not ranks.reads_values:
        return F.linear(tokens, ranks.own(projection.weight).to(dtype), bias)
    part = F.linear(tokens, projection.weight.to_local().to(dtype))
    dt = (_Sum if ranks.is_shared else _SumOfOwnHeads).apply(part, ranks.group)
    return dt if bias is None else dt + bias


def _compute(gate: ImportanceGate, ranks: _Ranks, source: torch.Tensor) -> torch.Tensor:
    """Returns the importance of this rank's heads, as the forward of the gate does that of all."""
    gate.check_source(source)
    if not (ranks.is_shared or ranks.reads_values):
        source = _SumOfGradients.apply(source, ranks.group)
    A, form = ranks.own(gate.A), gate.config.importance
    importance = compute_importance(source, gate.dt_proj, A, form, exact=not gate.training)
    return _SumOfGradients.apply(importance, ranks.group) if ranks.is_shared else importance


class _SumOfOwnHeads(torch.autograd.Function):
    """Returns this rank's heads of the sum over the ranks of tensors (..., heads); the gradient reaches all of them."""

    @staticmethod
    def forward(ctx, part, group):
        ctx.group = group
        parts = torch.stack(part.chunk(group.size(), -1))
        own = parts.new_empty(parts.shape[1:])
        reduce_scatter(own.view(-1), parts.view(-1), group=group)
        return own

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        wholes = gradient.new_empty((ctx.group.size(), *gradient.shape))
        all_gather(wholes.view(-1), gradient.contiguous().view(-1), group=ctx.group)
        return torch.cat(wholes.unbind(), -1), None


class _Sum(torch.autograd.Function):
    """Returns the sum over the ranks, of which each has the whole gradient already."""

    @staticmethod
    def forward(ctx, part, group):
        return _summed(part, group)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        return gradient, None


class _SumOfGradients(torch.autograd.Function):
    """Returns what all ranks have alike, and sums the gradients of what each of them makes of it."""

    @staticmethod
    def forward(ctx, tensor, group):
        ctx.group = group
        return tensor.view_as(tensor)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        return _summed(gradient, ctx.group), None


def _summed(tensor: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    total = tensor.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total


def rules_of_gates(model: nn.Module, plan: dict[str, str], num_ranks: int) -> dict[str, str]:
    """Returns what a tensor parallel plan of a model lacks for the gates whose attention modules it splits by head.

    plan: name of a module, with "*" for numbers -> its style. Gates of modules that gather their heads stay whole.
    Raises ValueError for gates that cannot be split.
    """
    rules = {}
    for name, module, gate in iter_gates(model):
        place = replace_layer_number_by_wildcard(name)
        projection = next((each for each in _VALUE_PROJECTIONS if getattr(module, each, None) is not None), None)
        if plan.get(f"{place}.{projection}") != "colwise":
            continue
        if not isinstance(gate, ImportanceGate):
            raise ValueError(
                f"tensor parallelism cannot split {type(module).__name__}, whose importance is its own: convert a "
                "model with another attention"
            )
        if gate.num_kv_heads % num_ranks:
            raise ValueError(
                f"tensor parallelism needs a number of ranks that divides the {gate.num_kv_heads} kv heads of layer "
                f"{gate.layer_idx}, got {num_ranks} ranks"
            )
        rules[f"{place}.{GATE_NAME}"] = STYLE
    return rules


def initialize_on_ranks(gate: ImportanceGate) -> None:
    """Initialises the parameters of a gate that no checkpoint has given, to the values that the first rank draws.

    All ranks call it. Each keeps its part, so that a gate starts the same however many ranks share it.
    """
    missing = [
        (owner, name, part)
        for owner in (gate, gate.dt_proj)
        for name, part in owner.named_parameters(recurse=False)
        if not getattr(part, "_is_hf_initialized", False)
    ]
    for owner, name, part in missing:
        setattr(owner, name, nn.Parameter(torch.empty(part.shape, dtype=part.dtype, device=part.device)))
    gate.initialize()
    with torch.no_grad():
        for owner, name, part in missing:
            whole = getattr(owner, name).data
            dist.broadcast(whole, 0)
            setattr(owner, name, part)
            if isinstance(part, DTensor):
                part.to_local().copy_(DtensorShardOperation(part).shard_tensor(whole))
            else:
                part.copy_(whole)
