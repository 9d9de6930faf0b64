"""torch.compile(fullgraph=True) traces the training forward of a converted model."""

import copy

import pytest
import torch

from ..converted import converted
from ..tiny import tokens


def padded():
    mask = torch.ones(2, 24, dtype=torch.long)
    mask[0, :5] = 0
    return {"attention_mask": mask}


INPUTS = {
    "plain": dict,
    "all_ones": lambda: {"attention_mask": torch.ones(2, 24, dtype=torch.long)},
    "padded": padded,
    "packed": lambda: {"position_ids": torch.cat([torch.arange(10), torch.arange(14)]).repeat(2, 1)},
}


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("case, model_type", [*((case, "llama") for case in INPUTS), ("padded", "gemma2")])
def test_training_forward_compiles_to_one_graph(case, model_type, backend):
    torch.compiler.reset()
    model = converted(model_type).train()
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend=backend)
    inputs = {"input_ids": tokens(), "labels": tokens(), "use_cache": False, **INPUTS[case]()}
    torch.testing.assert_close(step(compiled, **inputs), step(model, **inputs), atol=1e-8, rtol=1e-6)


def step(run, **inputs):
    output = run(**inputs)
    output.loss.backward()
    return output.logits, output.loss, model_gradients(run)


def test_the_triton_engine_compiles_to_one_graph(monkeypatch):
    """On a CPU in Triton's interpreter; test_gpu.py has it compiled."""
    pytest.importorskip("triton", reason="Triton is published for Linux only")
    monkeypatch.setenv("FLASH_DMATTN_BACKEND", "triton")
    torch.compiler.reset()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = converted("llama").float().to(device).train()
    inputs = {"input_ids": tokens(), "labels": tokens(), **padded()}
    inputs = {name: tensor.to(device) for name, tensor in inputs.items()} | {"use_cache": False}
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(step(compiled, **inputs), step(model, **inputs), atol=1e-4, rtol=1e-4)


def model_gradients(model):
    model = getattr(model, "_orig_mod", model)
    return {name: parameter.grad for name, parameter in model.named_parameters()}
