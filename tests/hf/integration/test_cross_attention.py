"""Cross-attention beside causal self-attention is computed as eager attention does, whatever the window."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, DynamicCache, EncoderDecoderCache
from transformers.cache_utils import DynamicLayer
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from flash_dmattn_hf import DynamicMaskCache, dynamic_mask_config, iter_gates
from flash_dmattn_hf.cache.layer import DynamicMaskCacheLayer
from flash_dmattn_hf.integration.attention import dynamic_mask_attention_forward

from ..dense_definition import by_definition
from ..tiny import tokens

BART = {
    "vocab_size": 99,
    "d_model": 32,
    "decoder_layers": 2,
    "decoder_attention_heads": 4,
    "decoder_ffn_dim": 32,
    "max_position_embeddings": 64,
    "dropout": 0.0,
    "pad_token_id": 0,
}


def make_bart(attn_implementation, window=24, **values):
    """values: change the sizes of BART."""
    torch.manual_seed(0)
    with dynamic_mask_config(keep_window_size=window, num_sink_tokens=2, local_window_size=3):
        config = CONFIG_MAPPING["bart"](**{**BART, **values})
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attn_implementation).eval()
    with torch.no_grad():
        for _, _, gate in iter_gates(model):
            gate.A.normal_()
            gate.dt_proj.weight.normal_()
    return model


def encoder_states():
    states = torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(1))
    return {"encoder_hidden_states": states, "encoder_attention_mask": torch.tensor([[1] * 7, [1] * 4 + [0] * 3])}


def test_only_self_attention_has_gates():
    assert [name for name, _, _ in iter_gates(make_bart("flash_dmattn"))] == [
        "model.decoder.layers.0.self_attn",
        "model.decoder.layers.1.self_attn",
    ]


@pytest.mark.parametrize("has_padding", [True, False])
@torch.no_grad()
def test_an_encoder_is_seen_as_by_eager_attention(has_padding):
    ours, eager = make_bart("flash_dmattn"), make_bart("eager")
    for _, _, gate in iter_gates(ours):
        gate.A.zero_()
    assert not eager.load_state_dict(ours.state_dict(), strict=False).missing_keys
    inputs = {"input_ids": tokens(), **encoder_states()}
    if not has_padding:
        del inputs["encoder_attention_mask"]
    expected = eager(**inputs, use_cache=False).logits
    torch.testing.assert_close(ours(**inputs, use_cache=False).logits, expected, atol=1e-5, rtol=1e-5)
    other = {**inputs, "encoder_hidden_states": -inputs["encoder_hidden_states"]}
    assert not torch.allclose(ours(**other, use_cache=False).logits, expected, atol=1e-3)


@torch.no_grad()
def test_beyond_the_window_it_is_the_definition():
    model = make_bart("flash_dmattn", window=8).double()
    inputs = {"input_ids": tokens(), "encoder_hidden_states": encoder_states()["encoder_hidden_states"].double()}
    ours = model(**inputs, use_cache=False).logits
    with by_definition(model):
        torch.testing.assert_close(ours, model(**inputs, use_cache=False).logits, atol=1e-5, rtol=1e-5)


def test_a_cache_that_would_mix_both_is_refused():
    model = make_bart("flash_dmattn", window=8)
    for _ in range(2):
        with pytest.raises(ValueError, match="which a DynamicMaskCache does not hold: pass use_cache=False"):
            model.generate(tokens(), **encoder_states(), max_new_tokens=2, do_sample=False)


@torch.no_grad()
def test_a_cache_that_holds_both_apart_is_right():
    model, inputs = make_bart("flash_dmattn", window=8), {"input_ids": tokens(), **encoder_states()}
    cache = EncoderDecoderCache(DynamicCache(config=model.config), DynamicCache(config=model.config))
    expected = model(**inputs, use_cache=False).logits
    for rows in (slice(0, 12), slice(12, 13), slice(13, 24)):
        step = {**inputs, "input_ids": inputs["input_ids"][:, rows], "past_key_values": cache}
        torch.testing.assert_close(model(**step).logits, expected[:, rows], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"softcap": 1.0}, "attends to other tokens with a softcap"),
        ({"s_aux": torch.ones(4)}, "attends to other tokens with attention sinks"),
        ({"position_bias": torch.ones(1)}, "passes a position bias"),
        ({"output_attentions": True}, "output_attentions=True needs"),
    ],
)
def test_what_sdpa_would_ignore_is_refused(arguments, message):
    module = make_bart("flash_dmattn").model.decoder.layers[0].encoder_attn
    states = torch.randn(2, 4, 5, 8)
    with pytest.raises(ValueError, match=message):
        dynamic_mask_attention_forward(module, states, states, states, None, **arguments)


def test_a_decoder_with_fewer_layers_than_its_encoder_has_a_static_cache():
    """As in distilbart: its config, and with it a cache of transformers, counts the layers of the encoder."""
    model = make_bart("flash_dmattn", window=8, encoder_layers=4).double()
    cache = DynamicMaskCache(model, static=True)
    assert [type(layer) for layer in cache.layers] == [DynamicMaskCacheLayer] * 2 + [DynamicLayer] * 2
    ids, options = tokens(), {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    expected = model.generate(ids, use_cache=False, **options)
    assert torch.equal(model.generate(ids, past_key_values=cache, **options), expected)
    assert torch.equal(model.generate(ids, cache_implementation="static", **options), expected)
    assert not any(layer.is_initialized for layer in cache.layers[2:])
    assert cache.snapshot().restore(model, 1, static=True).num_tokens == cache.num_tokens


def test_a_vision_tower_that_is_no_model_of_its_own_keeps_its_attention():
    config = CONFIG_MAPPING["idefics"](
        vocab_size=99,
        additional_vocab_size=0,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        cross_layer_interval=1,
        vision_config={
            "embed_dim": 32,
            "image_size": 16,
            "patch_size": 8,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "intermediate_size": 32,
        },
    )
    model = AutoModelForImageTextToText.from_config(config, attn_implementation="flash_dmattn")
    assert model.config.vision_config._attn_implementation == "sdpa"
    image = {"pixel_values": torch.randn(2, 1, 3, 16, 16), "image_attention_mask": torch.ones(2, 24, 1)}
    assert model(tokens(), **image, use_cache=False).logits.shape == (2, 24, 99)
