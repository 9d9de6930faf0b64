"""What a model must be to be distilled, checked before anything of it changes."""

import torch
from torch import nn
from transformers.integrations import is_deepspeed_zero3_enabled

from flash_dmattn_hf.gates.attach import iter_gates
from flash_dmattn_hf.gates.importance import Gate
from flash_dmattn_hf.training.compiled_layers import check_checkpointing
from flash_dmattn_hf.training.distillation_arguments import DistillationArguments
from flash_dmattn_hf.training.gate_preparation import check_gates


def check_student(model: nn.Module, args: DistillationArguments) -> bool:
    """Returns whether any weight outside of the gates trains; raises what `DistillationTrainer` says."""
    check_gates(model)
    if is_deepspeed_zero3_enabled():
        raise ValueError(
            "DistillationTrainer does not support ZeRO-3 of DeepSpeed, which leaves no process the gates that are "
            "prepared for training: use FSDP2"
        )
    _refuse_half_precision(model)
    if args.compile_layers and (args.gradient_checkpointing or getattr(model, "is_gradient_checkpointing", False)):
        check_checkpointing()
    in_gates = {id(parameter) for _, _, gate in iter_gates(model) for parameter in gate.parameters()}
    trains_backbone = any(p.requires_grad and id(p) not in in_gates for p in model.parameters())
    adds_bias = any(gate.config.add_importance_bias for _, _, gate in iter_gates(model))
    if args.hard_share and not (trains_backbone or adds_bias):
        raise ValueError(
            f"hard_share must be 0, got {args.hard_share}: nothing would have a gradient under the hard mask, "
            "because only the importance trains and it is not added to the logits"
        )
    if not trains_backbone and not any(map(_keeps_by_importance, iter_gates(model))):
        raise ValueError(
            "num_sink_tokens + local_window_size must be below keep_window_size when only the importance trains: "
            "no key is kept for its importance, so nothing would have a gradient"
        )
    return trains_backbone


def _keeps_by_importance(found: tuple[str, nn.Module, Gate]) -> bool:
    keep, sinks, local, _ = found[2].windows
    return keep > sinks + local


def _refuse_half_precision(model: nn.Module) -> None:
    gates = {id(parameter) for _, _, gate in iter_gates(model) for parameter in gate.parameters()}
    for name, parameter in model.named_parameters():
        is_half = parameter.dtype in (torch.float16, torch.bfloat16)
        if is_half and (parameter.requires_grad or id(parameter) in gates):
            raise ValueError(
                f"what trains must be float32, got {name} in {parameter.dtype}: load the model with "
                "dtype=torch.float32 and set bf16=True"
            )
