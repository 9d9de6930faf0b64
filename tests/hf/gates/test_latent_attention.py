"""Multi-head latent attention (MLA), one importance for all heads, and attention dropout in training."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from flash_dmattn_hf import DynamicMaskCache, dynamic_mask_config, iter_gates

from ..converted import WINDOW, converted
from ..dense_definition import by_definition
from ..generation_models import greedy, left_padded_prompt, make_model
from ..tiny import build, tiny_config, tokens

SHARED = {"importance_heads": "shared"}


def logits_and_gradients(model, input_ids, context):
    model.zero_grad()
    with context:
        logits = model(input_ids, use_cache=False).logits
        logits.square().sum().backward()
    return logits.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("model_type", ["llama", "deepseek_v3"])
@pytest.mark.parametrize("source", ["value", "hidden"])
def test_one_importance_for_all_heads_equals_the_definition(model_type, source):
    model = converted(model_type, importance_input=source, **SHARED).train()
    assert all(gate.A.shape == (1,) for _, _, gate in iter_gates(model))
    input_ids = tokens(2, 20)
    (ours, gradients), (expected, expected_gradients) = (
        logits_and_gradients(model, input_ids, context) for context in (torch.enable_grad(), by_definition(model))
    )
    torch.testing.assert_close(ours, expected, atol=1e-9, rtol=1e-9)
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in expected_gradients.items():
        torch.testing.assert_close(gradients[name], gradient, atol=1e-7, rtol=1e-7, msg=name)


@pytest.mark.parametrize("model_type", ["llama", "deepseek_v3"])
@pytest.mark.parametrize("source", ["value", "hidden"])
@pytest.mark.parametrize("implementation", ["dynamic", "static"])
def test_one_importance_for_all_heads_generates_as_without_a_cache(model_type, source, implementation):
    model, input_ids = converted(model_type, importance_input=source, **SHARED), tokens(2, 14)
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    cache = {} if implementation == "dynamic" else {"cache_implementation": implementation}
    cached = model.generate(input_ids, **options, **cache)
    assert torch.equal(cached, model.generate(input_ids, **options, use_cache=False))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU: Triton's kernels and a captured step")
@pytest.mark.parametrize("kind", ["deepseek-v3", "deepseek-v3-shared"])
def test_a_gpu_generates_with_every_cache_as_without_one(kind):
    model = make_model(kind, dtype=torch.float32).cuda()
    ids, mask = (tensor.cuda() for tensor in left_padded_prompt())
    expected = greedy(model, ids, mask, use_cache=False)
    assert torch.equal(greedy(model, ids, mask), expected)
    assert torch.equal(greedy(model, ids, mask, cache_implementation="static"), expected)


@pytest.mark.parametrize(("heads", "numbers"), [("kv", 4 * (12 + 8)), ("shared", 16 + 4)])
def test_a_cache_holds_latents_where_all_heads_see_the_same_keys(heads, numbers):
    """Keys of 8 + 4 and values of 8 numbers for each of 4 heads, or a latent of 16 and a rotated key of 4."""
    model = converted("deepseek_v3", importance_heads=heads)
    cache = DynamicMaskCache(model)
    with torch.no_grad():
        model(tokens(1, 30), past_key_values=cache)
    for layer in cache.layers:
        assert layer.keys.numel() + layer.values.numel() == WINDOW["keep_window_size"] * numbers
        assert layer.num_keys == WINDOW["keep_window_size"]


@pytest.mark.parametrize("heads", ["kv", "shared"])
def test_a_saved_cache_goes_on(heads):
    model, input_ids = converted("deepseek_v3", importance_heads=heads), tokens(1, 20)
    first, second = DynamicMaskCache(model), DynamicMaskCache(model)
    with torch.no_grad():
        model(input_ids[:, :15], past_key_values=first)
        second.load_state_dict(first.state_dict())
        ours, expected = (model(input_ids[:, 15:], past_key_values=cache).logits for cache in (second, first))
    assert torch.equal(ours, expected)


@pytest.mark.parametrize("heads", ["kv", "shared"])
@pytest.mark.parametrize("model_type", ["deepseek_v2", "deepseek_v3"])
def test_it_loads_by_name_trains_saves_and_loads_again(model_type, heads, tmp_path):
    build(tiny_config(model_type)).save_pretrained(tmp_path / "dense")
    settings = {**WINDOW, "importance_heads": heads}
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "dense", attn_implementation="flash_dmattn", flash_dmattn=settings
    ).train()
    optimizer, input_ids = torch.optim.SGD(model.parameters(), lr=0.1), tokens(2, 24)
    losses = []
    for _ in range(3):
        loss = model(input_ids, labels=input_ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[2] < losses[0]
    assert all(gate.A.abs().max() > 0 for _, _, gate in iter_gates(model))
    model.eval().save_pretrained(tmp_path / "ours")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", attn_implementation="flash_dmattn").eval()
    with torch.no_grad():
        assert torch.equal(again(input_ids).logits, model(input_ids).logits)


@pytest.mark.parametrize("model_type, field", [("llama", "attention_dropout"), ("gpt2", "attn_pdrop")])
def test_attention_dropout_of_the_config_is_applied_in_training_alone(model_type, field, monkeypatch):
    with dynamic_mask_config(keep_window_size=64):  # wider than the text, so that eager attention sees the same keys
        model = build(tiny_config(model_type, **{field: 0.3}), attn_implementation="flash_dmattn")
    eager, input_ids = build(tiny_config(model_type), attn_implementation="eager").eval(), tokens(2, 24)
    eager.load_state_dict({name: x for name, x in model.state_dict().items() if ".dma." not in name})
    with torch.no_grad():
        exact = eager(input_ids).logits
        torch.testing.assert_close(model.eval()(input_ids).logits, exact, atol=1e-5, rtol=1e-5)
        model.train()
        torch.manual_seed(1)
        first, second = (model(input_ids, use_cache=False).logits for _ in range(2))
        torch.manual_seed(1)
        assert torch.equal(model(input_ids, use_cache=False).logits, first)
    assert not torch.allclose(first, exact, atol=1e-3) and not torch.allclose(first, second, atol=1e-3)


def test_dropout_holds_over_a_cache_too():
    """In training mode no step goes into the slots past dropout."""
    model = build(tiny_config("llama", attention_dropout=0.5), attn_implementation="flash_dmattn").train()
    results = []
    for seed in (1, 2, 1):
        cache = DynamicMaskCache(model)
        torch.manual_seed(0)
        with torch.no_grad():
            model(tokens(1, 10), past_key_values=cache)
            torch.manual_seed(seed)
            results.append(model(tokens(1, 1, seed=5), past_key_values=cache).logits)
    assert torch.equal(results[0], results[2]) and not torch.allclose(results[0], results[1], atol=1e-5)


def test_gradient_checkpointing_drops_the_same_weights_again():
    model, input_ids = build(tiny_config("gpt2", attn_pdrop=0.3), attn_implementation="flash_dmattn").train(), tokens()
    results = []
    for is_checkpointed in (False, True):
        if is_checkpointed:
            model.gradient_checkpointing_enable()
        torch.manual_seed(3)
        results.append(logits_and_gradients(model, input_ids, torch.enable_grad()))
    (plain, gradients), (again, gradients_again) = results
    assert not torch.allclose(plain, model.eval()(input_ids).logits, atol=1e-3)
    assert torch.equal(plain, again) and gradients.keys() == gradients_again.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradients_again[name], gradient, msg=name)
