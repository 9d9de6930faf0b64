"""The importance of a gate: in blocks without gradients, and by the fused kernel where a prompt has its precision."""

import pytest
import torch

from flash_dmattn_hf import DynamicMaskConfig
from flash_dmattn_hf.gates import importance
from flash_dmattn_hf.gates.importance import ImportanceGate


def make_gate(**settings):
    config = DynamicMaskConfig(**settings).resolve()
    gate = ImportanceGate(config, layer_idx=0, num_heads=4, num_kv_heads=2, head_dim=8).eval()
    with torch.no_grad():
        for parameter in gate.parameters():
            parameter.normal_()
    return gate


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("heads", ["kv", "query", "shared"])
def test_blocks_end_in_the_bits_of_the_whole(monkeypatch, heads, dtype):
    gate, source = make_gate(importance_heads=heads), torch.randn(2, 2, 33, 8).to(dtype)
    sizes = []
    gate.dt_proj.register_forward_pre_hook(lambda module, args: sizes.append(args[0].shape[1]))
    monkeypatch.setattr(importance, "_BLOCK", 8)
    with torch.no_grad():
        blocked = gate(source)
    assert sizes == [8, 8, 8, 8, 1] and blocked.dtype == torch.float32
    assert torch.equal(gate(source), blocked)
    gate.train()
    with torch.no_grad():
        gate(source)
    assert sizes[5:] == [33, 33]


def test_the_fused_kernel_serves_no_training(monkeypatch):
    gate, source = make_gate(), torch.randn(2, 2, 1, 8)
    monkeypatch.setattr(importance, "can_fuse", lambda *args: True)
    monkeypatch.setattr(importance, "token_importance", lambda *args: "fused")
    with torch.no_grad():
        assert gate(source) == "fused"
        gate.train()
        plain = importance.compute_importance(source, gate.dt_proj, gate.A, gate.config.importance, exact=False)
        assert torch.equal(gate(source), plain)
