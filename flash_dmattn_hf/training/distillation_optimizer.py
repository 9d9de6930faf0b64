"""The optimizer of a distillation: backbone and importance, each with its own learning rate and gradient norm."""

from collections.abc import Sequence

import torch
from torch import nn

from flash_dmattn_hf.gates.attach import iter_gates
from flash_dmattn_hf.training.distillation_arguments import DistillationArguments
from flash_dmattn_hf.training.importance import IMPORTANCE_GROUP
from flash_dmattn_hf.training.standardized_inputs import StandardizedLayer, clip_each_group, standardize_inputs


def make_optimizer(
    model: nn.Module, args: DistillationArguments, layers: Sequence[StandardizedLayer], gate_learning_rate: float
) -> torch.optim.Optimizer:
    """Returns AdamW over what trains of the backbone, and over layers, the dt_proj of the gates.

    gate_learning_rate: the largest, of layers; that of the backbone is in args.
    """
    gates = [parameter for layer in layers for parameter in layer.parameters()]
    in_gates = {id(parameter) for _, _, gate in iter_gates(model) for parameter in gate.parameters()}
    backbone = [p for p in model.parameters() if p.requires_grad and id(p) not in in_gates]
    groups = [
        {"name": "backbone", "params": backbone, "lr": args.learning_rate, "weight_decay": args.weight_decay},
        {"name": IMPORTANCE_GROUP, "params": gates, "lr": gate_learning_rate, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(
        [group for group in groups if group["params"]],
        betas=(args.adam_beta1, args.adam_beta2),
        eps=args.adam_epsilon,
        fused=True if gates[0].is_cuda else None,
    )
    standardize_inputs(optimizer, layers)
    clip_each_group(optimizer, args.clip_norm)
    return optimizer
