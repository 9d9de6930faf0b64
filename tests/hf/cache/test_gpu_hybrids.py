"""Captured decoding of models whose layers differ, on a GPU: the ids of the dynamic cache, and of none."""

import pytest
import torch
from transformers import CompileConfig

from flash_dmattn_hf import DynamicMaskCache
from flash_dmattn_hf.cache import cuda_graph as captured

from .test_static_hybrids import KINDS, greedy, make_model, prompt

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU: graphs and compiled Triton kernels"),
]

NEW = 40
CAPTURED = [kind for kind in KINDS if not kind.startswith("gemma3n")]  # which copies numbers from the host


def on_gpu(kind, *shape):
    model = make_model(kind).to("cuda", torch.float32)
    return model, *(tensor.cuda() for tensor in prompt(*shape))


@pytest.mark.parametrize("shape", [(6, 3), (21, 4), (21, 4, 6)], ids=["below-windows", "beyond", "gap"])
@pytest.mark.parametrize("kind", CAPTURED)
def test_captured_steps_generate_what_the_dynamic_cache_generates(kind, shape):
    model, ids, mask = on_gpu(kind, *shape)
    expected = greedy(model, ids, mask, new=NEW)
    found = greedy(model, ids, mask, new=NEW, cache_implementation="static")
    assert torch.equal(found, expected)


@torch.no_grad()
@pytest.mark.parametrize("kind", CAPTURED)
def test_captured_steps_are_near_one_pass(kind):
    """Across the ends of windows and chunks, which the capture cannot have known."""
    model, *_ = on_gpu(kind, 5, 0)
    generator = torch.Generator().manual_seed(0)
    ids = torch.stack([torch.randperm(90, generator=generator)[:48] + 4 for _ in range(2)]).cuda()  # no ties
    expected = model(ids, use_cache=False).logits
    cache, forward = DynamicMaskCache(model, static=True), captured.CapturedForward(model)
    steps = captured.StepForward(model, forward)
    logits = [model(ids[:, :5], past_key_values=cache).logits]
    for row in range(5, ids.shape[1]):
        step = {"input_ids": ids[:, row : row + 1], "position_ids": torch.full((2, 1), row, device="cuda")}
        logits.append(steps(**step, past_key_values=cache).logits)
    torch.testing.assert_close(torch.cat(logits, dim=1), expected, atol=2e-3, rtol=2e-3)
    assert forward._graph is not None and cache.get_seq_length() == ids.shape[1]


def test_a_forward_that_copies_from_the_host_is_not_captured():
    model, ids, mask = on_gpu("gemma3n_text", 21, 4)
    for layer in model.model.layers:  # as in the first ten layers of the published models
        layer.mlp.activation_sparsity = 0.95
    with pytest.raises(RuntimeError, match="Gemma3nForCausalLM cannot be captured .* pass compile_config="):
        greedy(model, ids, mask, new=NEW, cache_implementation="static")
    assert greedy(model, ids, mask, new=NEW).shape[1] == 21 + NEW  # nothing is left behind


@pytest.mark.parametrize("kind", ["gemma3_text", "gpt_oss", "lfm2", "gemma3n_text"])
def test_compiled_steps_generate_the_same_ids(kind):
    torch.compiler.reset()
    model, ids, mask = on_gpu(kind, 21, 4)
    options = {"cache_implementation": "static", "compile_config": CompileConfig()}
    assert torch.equal(greedy(model, ids, mask, new=NEW, **options), greedy(model, ids, mask, new=NEW))
