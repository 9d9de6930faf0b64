"""Attention sinks on a GPU: the kernels' lse carries them through training, prefill and captured decoding."""

import pytest
import torch
from transformers import GptOssConfig, GptOssForCausalLM

from flash_dmattn_hf import dynamic_mask_config, iter_gates

from ..dense_definition import by_definition
from ..gpu_models import VOCABULARY, WINDOW, make_tokens

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU: compiled kernels and graphs"),
]


def make_model(dtype=torch.float32):
    """A small gpt_oss whose layers all have gates, its sinks far from zero."""
    torch.manual_seed(0)
    config = GptOssConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        num_local_experts=2,
        num_experts_per_tok=2,
        layer_types=["full_attention"] * 2,
        initializer_range=0.1,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,
    )
    config._experts_implementation = "eager"
    with dynamic_mask_config(**WINDOW):
        model = GptOssForCausalLM._from_config(config, attn_implementation="flash_dmattn")
    with torch.no_grad():
        for _, module, gate in iter_gates(model):
            module.sinks.normal_(std=2.0)
            gate.A.normal_()
            gate.dt_proj.weight.normal_(std=0.5)
    model.generation_config.pad_token_id = 0
    return model.to("cuda", dtype).eval()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-3), (torch.bfloat16, 5e-2)])
def test_gradients_are_those_of_the_definition(dtype, tolerance):
    model, input_ids = make_model(torch.float32), make_tokens(2)
    results = []
    for run in (lambda: model(input_ids, use_cache=False), lambda: definition(model, input_ids)):
        model.zero_grad()
        with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
            logits = run().logits
        logits.float().square().mean().backward()
        results.append((logits.float(), [module.sinks.grad.clone() for _, module, _ in iter_gates(model)]))
    (ours, our_sinks), (expected, sinks) = results
    if dtype == torch.float32:  # rounding to bfloat16 changes which keys are kept in the second layer
        torch.testing.assert_close(ours, expected, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(our_sinks[0], sinks[0], atol=tolerance * sinks[0].abs().max().item(), rtol=tolerance)
    assert our_sinks[0].abs().max() > 0


def definition(model, input_ids):
    with by_definition(model):
        return model(input_ids, use_cache=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_captured_generation_gives_the_ids_of_eager_generation(dtype):
    model, input_ids = make_model(dtype), make_tokens(3, 150)
    model.set_experts_implementation("batched_mm")  # a loop over experts waits for the GPU
    mask = torch.ones_like(input_ids)
    mask[0, :40] = 0
    prompt = {"inputs": input_ids, "attention_mask": mask, "do_sample": False, "max_new_tokens": 100}
    assert torch.equal(model.generate(**prompt, cache_implementation="static"), model.generate(**prompt))


@torch.no_grad()
def test_generation_with_a_cache_is_near_generation_without():
    model, input_ids = make_model(), make_tokens(2, 150)
    options = {"do_sample": False, "max_new_tokens": 1, "return_dict_in_generate": True, "output_logits": True}
    cached = model.generate(input_ids, **options).logits[0]
    torch.testing.assert_close(cached, model(input_ids, use_cache=False).logits[:, -1].float(), atol=2e-3, rtol=2e-3)
