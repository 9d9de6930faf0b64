"""A gate stands where its layer computes, in a dtype that can be trained, whatever the layer's weights are."""

import pytest
import torch
from accelerate import cpu_offload
from torch import nn

from flash_dmattn_hf import DynamicMaskConfig, iter_gates
from flash_dmattn_hf.gates.attach import attach, plan

from ..tiny import tiny_model, tokens

QUANTIZED = [torch.uint8, torch.int8, torch.float8_e4m3fn]
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")


def give_gates(model):
    attach(model, plan(model, DynamicMaskConfig(keep_window_size=16).resolve()))
    return [gate for _, _, gate in iter_gates(model)]


@pytest.mark.parametrize("device", ["cpu", "meta"])  # "meta" stands for another device than the default one
@pytest.mark.parametrize("dtype", QUANTIZED, ids=str)
@pytest.mark.parametrize("configured", [torch.bfloat16, None], ids=str)
def test_beside_quantized_weights(dtype, device, configured):
    model = tiny_model("llama")
    model.config.dtype = configured
    for layer in model.model.layers:
        for name in PROJECTIONS:
            packed = nn.Parameter(torch.zeros(8, device=device).to(dtype), requires_grad=False)
            getattr(layer.self_attn, name).weight = packed
    for gate in give_gates(model):
        for parameter in gate.parameters():
            assert parameter.device.type == device and parameter.dtype == (configured or torch.float32)


def test_beside_weights_that_are_buffers():
    model = tiny_model("llama")
    model.config.dtype = torch.bfloat16
    for layer in model.model.layers:
        for name in PROJECTIONS:
            packed = getattr(layer.self_attn, name)
            del packed.weight
            packed.register_buffer("qweight", torch.zeros(8, dtype=torch.int32, device="meta"))
    for gate in give_gates(model):
        assert {(parameter.device.type, parameter.dtype) for parameter in gate.parameters()} == {
            ("meta", torch.bfloat16)
        }


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_beside_weights_that_are_not_quantized(dtype):
    for gate in give_gates(tiny_model("llama", dtype=dtype)):
        assert {parameter.dtype for parameter in gate.parameters()} == {dtype}


def test_beside_offloaded_weights():
    """Their place is "meta" between two forwards; the gate, which no hook brings, stays where they are brought."""
    model, dense = tiny_model("llama"), tiny_model("llama")
    model = cpu_offload(model, execution_device=torch.device("cpu"))
    assert model.model.layers[0].self_attn.q_proj.weight.is_meta
    model.set_attn_implementation("flash_dmattn")
    for _, _, gate in iter_gates(model):
        assert {parameter.device.type for parameter in gate.parameters()} == {"cpu"}
    with torch.no_grad():
        torch.testing.assert_close(model(tokens()).logits, dense(tokens()).logits, atol=1e-5, rtol=1e-5)
