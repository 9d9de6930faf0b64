"""Disk offload of a checkpoint without importance: offloading only knows tensors that a checkpoint has."""

import torch
from accelerate.hooks import remove_hook_from_module

from flash_dmattn_hf.gates.importance import ImportanceGate


def materialize(gate: ImportanceGate) -> None:
    """Initialises a gate that was sent to disk without a file there, and keeps it where its layer computes.

    A gate is small: Hi * Hkv * D numbers.
    """
    if not any(parameter.is_meta for parameter in gate.parameters()):
        return
    device = torch.device("cpu")
    for module in gate.modules():
        hook = getattr(module, "_hf_hook", None)
        if hook is None:
            continue
        device = torch.device(getattr(hook, "execution_device", None) or device)
        hook.original_devices = {}  # removal would look for the tensors on disk
        remove_hook_from_module(module)
    gate.to_empty(device=device)
    gate.initialize()
