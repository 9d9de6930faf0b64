"""Attention sinks: one logit per head, which a static cache knows as well, and which calibration refuses."""

import pytest
import torch

from flash_dmattn_hf import dynamic_mask_config
from flash_dmattn_hf.integration.attention import dynamic_mask_attention_forward
from flash_dmattn_hf.integration.observed_attention import observed_attention

from ..converted import WINDOW, converted
from ..tiny import build, tiny_config, tokens


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_sink_of_minus_infinity_takes_nothing_and_a_large_one_everything(dropout):
    module = converted().model.layers[0].self_attn.train()
    query, key = torch.randn(1, 4, 5, 8).double(), torch.randn(1, 2, 5, 8).double()
    value = torch.randn(1, 2, 5, 8).double()
    sinks, found = torch.tensor([-torch.inf, -torch.inf, 1e4, 1e4]), []
    for options in ({}, {"s_aux": sinks}):
        torch.manual_seed(0)  # which weights are dropped
        found.append(dynamic_mask_attention_forward(module, query, key, value, None, dropout=dropout, **options)[0])
    plain, out = found
    assert torch.equal(out[:, :, :2], plain[:, :, :2]) and plain.any()
    assert not out[:, :, 2:].any()


def test_sinks_of_another_shape_are_refused():
    module = converted().model.layers[0].self_attn
    query, key = torch.zeros(1, 4, 5, 8), torch.zeros(1, 2, 5, 8)
    with pytest.raises(ValueError, match=r"s_aux of LlamaAttention must have shape \(4,\), got \(1, 4, 1, 1\)"):
        dynamic_mask_attention_forward(module, query, key, key, None, s_aux=torch.zeros(1, 4, 1, 1))


def test_a_static_cache_generates_the_same_ids():
    torch.manual_seed(0)
    with dynamic_mask_config(**WINDOW):
        config = tiny_config("gpt_oss", layer_types=["full_attention"] * 2)
        model = build(config, attn_implementation="flash_dmattn").double().eval()
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    input_ids = tokens(2, 14)
    static = model.generate(input_ids, **options, cache_implementation="static")
    assert torch.equal(static, model.generate(input_ids, **options, use_cache=False))


def test_layers_with_sinks_cannot_be_observed():
    model = converted("gpt_oss")
    modules = [layer.self_attn for layer in model.model.layers]
    with pytest.raises(ValueError, match="attention sinks"), observed_attention(modules, lambda *_: None):
        model(tokens(), use_cache=False)
