"""When a kernel may be called without the operator around it, whose machinery costs the host more than the launch."""

import torch
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

_PLAIN = {torch.Tensor, torch.nn.Parameter, type(None)}


def can_call_directly(*tensors: torch.Tensor | None) -> bool:
    """Whether nobody would see the operator: plain tensors, no gradients, nothing that traces, maps or intercepts."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    if is_in_torch_dispatch_mode() or torch.jit.is_tracing() or torch._C._are_functorch_transforms_active():
        return False
    return _PLAIN.issuperset(map(type, tensors))
