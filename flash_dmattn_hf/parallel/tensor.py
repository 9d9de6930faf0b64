"""Tensor parallelism: every rank holds some heads of an attention module, and what its gate says about them.

transformers splits the values of a token by head, but dt of one head needs those of all heads. So each rank projects
its own values with the columns of dt_proj.weight that belong to them. The sum over the ranks is dt, and each rank gets
that of its own heads.
"""

import functools

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from transformers.distributed.sharding_utils import DtensorShardOperation
from transformers.integrations.tensor_parallel import TensorParallelLayer, replace_layer_number_by_wildcard

from flash_dmattn_hf.gates.attach import iter_gates
from flash_dmattn_hf.gates.importance import ImportanceGate, local_part
from flash_dmattn_hf.names import GATE_NAME
from flash_dmattn_hf.parallel.collectives import all_gather, reduce_scatter

STYLE = "flash_dmattn_gate"
"""The name of `GateParallel` in a tensor parallel plan of transformers."""

_VALUE_PROJECTIONS = ("v_proj", "kv_b_proj", "qkv_proj", "query_key_value", "k_proj")
"""Names of the projection whose output holds the values, the first that a module has."""


class GateParallel(TensorParallelLayer):
    """The style of a gate whose attention module is split by head; its parameters become DTensors.

    A and the bias are split by head, dt_proj.weight by the values of the heads; with importance_input="hidden" it is
    split by head too. With importance_heads="shared" every rank computes the one importance, and all of A and the bias.
    """

    def install_forward(self, module: ImportanceGate, mesh: DeviceMesh) -> ImportanceGate:
        group, config = mesh.get_group(), module.config
        is_shared, reads_values = config.importance_heads == "shared", config.importance_input == "value"
        module.num_kv_heads //= mesh.size()
        if reads_values:
            module.source_shape = (module.num_kv_heads, module.head_dim)
            _split(module.dt_proj, "weight", 1, mesh)
            module.dt_proj.forward = functools.partial(_project, module.dt_proj, group, is_shared)
        elif not is_shared:
            _split(module.dt_proj, "weight", 0, mesh)
        if not is_shared:
            module.num_importance_heads //= mesh.size()
            _split(module.dt_proj, "bias", 0, mesh)
            _split(module, "A", 0, mesh)
        if is_shared or not reads_values:
            module.forward = functools.partial(_compute, module, group, is_shared)
        return module


def _split(module: nn.Module, name: str, dim: int, mesh: DeviceMesh) -> None:
    """Makes a parameter, which has no values yet, a DTensor of which each rank has an equal part of a dimension."""
    if (whole := getattr(module, name)) is not None:
        split = distribute_tensor(whole, mesh, [Shard(dim)], src_data_rank=None)
        module._parameters[name] = nn.Parameter(split, requires_grad=whole.requires_grad)


def _project(projection: nn.Module, group: dist.ProcessGroup, is_shared: bool, tokens: torch.Tensor) -> torch.Tensor:
    """tokens: (..., in_features / ranks), the values of this rank. Returns dt (..., heads) of its heads, or the shared."""
    part = F.linear(tokens, local_part(projection.weight).to(tokens.dtype))
    dt = (_Sum if is_shared else _SumOfOwnHeads).apply(part, group)
    return dt if projection.bias is None else dt + local_part(projection.bias).to(dt.dtype)


def _compute(gate: ImportanceGate, group: dist.ProcessGroup, is_shared: bool, source: torch.Tensor) -> torch.Tensor:
    """Calls a gate whose ranks read the same (hidden states), or whose result they all use (a shared importance)."""
    if is_shared:
        return _SumOfGradients.apply(ImportanceGate.forward(gate, source), group)
    return ImportanceGate.forward(gate, _SumOfGradients.apply(source, group))


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
                f"tensor parallelism cannot split {type(module).__name__}, whose importance is its own: convert a model "
                "with another attention"
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
        owner._parameters[name] = nn.Parameter(local_part(part).new_empty(part.shape))
    gate.initialize()
    with torch.no_grad():
        for owner, name, part in missing:
            whole, owner._parameters[name] = owner._parameters[name].data, part
            dist.broadcast(whole, 0)
            own = DtensorShardOperation(part).shard_tensor(whole) if isinstance(part, DTensor) else whole
            local_part(part).copy_(own)
