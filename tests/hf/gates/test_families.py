"""Every accepted family computes what the definition says: forward, backward, padding, sliding, generation."""

import pytest
import torch

from flash_dmattn_hf import dynamic_mask_config, iter_gates

from ..converted import converted
from ..dense_definition import by_definition
from ..tiny import FAMILIES, build, tiny_config, tokens


def left_padded(length=24):
    input_ids = tokens(2, length)
    attention_mask = torch.ones_like(input_ids)
    attention_mask[0, :5] = 0
    return {"input_ids": input_ids, "attention_mask": attention_mask}


@pytest.mark.parametrize("model_type", FAMILIES)
def test_family_equals_the_definition(model_type):
    model = converted(model_type)
    model.train()
    inputs = left_padded()
    real = inputs["attention_mask"].bool()
    cotangent = torch.randn(int(real.sum()), model.config.get_text_config().vocab_size, dtype=torch.float64)
    results = []
    for context in (torch.enable_grad(), by_definition(model)):
        model.zero_grad()
        with context:
            logits = model(**inputs, use_cache=False).logits[real]
            (logits * cotangent).sum().backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        results.append((logits.detach(), gradients))
    (ours, our_gradients), (expected, gradients) = results
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)
    assert our_gradients.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(our_gradients[name], gradient, atol=1e-4, rtol=1e-4, msg=name)
    for _, _, gate in iter_gates(model):
        assert gate.A.grad.abs().max() > 0
        assert gate.dt_proj.weight.grad.abs().max() > 0


@pytest.mark.parametrize("model_type", FAMILIES)
def test_family_starts_as_the_dense_model(model_type):
    torch.manual_seed(0)
    wide = {"sliding_window": 64} if FAMILIES[model_type].get("sliding_window") else {}
    dense = build(tiny_config(model_type, **wide), attn_implementation="eager").eval()
    with dynamic_mask_config(keep_window_size=24):
        ours = build(tiny_config(model_type, **wide), attn_implementation="flash_dmattn").eval()
    assert not ours.load_state_dict(dense.state_dict(), strict=False).unexpected_keys
    inputs = left_padded()
    real = inputs["attention_mask"].bool()
    with torch.no_grad():
        torch.testing.assert_close(ours(**inputs).logits[real], dense(**inputs).logits[real], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_family_generates_as_without_a_cache(model_type):
    model = converted(model_type)
    inputs = left_padded(14)
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    cached = model.generate(**inputs, **options)
    assert torch.equal(cached, model.generate(**inputs, **options, use_cache=False))
    assert cached.shape == (2, 18)
