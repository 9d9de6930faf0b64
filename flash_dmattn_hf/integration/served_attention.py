"""Attention of the layers of a served model: to the slots of the requests whose tokens a batch holds."""

from typing import Any

import torch
from torch import nn

from flash_dmattn_hf.gates.importance import importance_of
from flash_dmattn_hf.integration.shared_keys import SharedKeys, share
from flash_dmattn_hf.serving.live_requests import LiveRequests


def attend_served(
    module: nn.Module,
    shared: SharedKeys,
    requests: LiveRequests,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    options: dict[str, Any],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attends to the slots of the requests whose tokens these are, and lets those evict.

    query: (1, H, T, D). key: (1, Hkv, T, D), value: (1, Hkv, T, Dv). options: softmax_scale and softcap.
    Returns out (1, T, H, Dv) and lse (1, H, T).
    """
    gate = shared.gate
    options["add_importance_bias"] = gate is not None and gate.config.add_importance_bias
    if shared.served is not None:
        return requests.attend_again(shared.served[1], query.transpose(1, 2), **options)
    if getattr(module, "store_full_length_kv", False):
        share(key, SharedKeys(gate, served=(requests, module.layer_idx)))
    if gate is None:
        importance = torch.zeros(value.shape[:3], dtype=torch.float32, device=value.device)
    else:
        importance = importance_of(gate, value)
    if importance.shape[1] == 1:  # one for all heads
        importance = importance.expand(-1, value.shape[1], -1)
    query, key = query.to(value.dtype), key.to(value.dtype)
    return requests.attend(module.layer_idx, query.transpose(1, 2), key, value, importance, **options)
