"""torch.compile(fullgraph=True) traces the training forward of a converted model."""

import copy

import pytest
import torch

from .test_masks import make
from .tiny import tokens


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
    model = make(model_type).train()
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend=backend)
    inputs = {"input_ids": tokens(), "labels": tokens(), "use_cache": False, **INPUTS[case]()}
    results = []
    for run in (model, compiled):
        output = run(**inputs)
        output.loss.backward()
        results.append((output.logits, output.loss, model_gradients(run)))
    torch.testing.assert_close(results[0], results[1], atol=1e-8, rtol=1e-6)


def model_gradients(model):
    model = getattr(model, "_orig_mod", model)
    return {name: parameter.grad for name, parameter in model.named_parameters()}
