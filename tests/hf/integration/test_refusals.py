"""What cannot be right is refused with one sentence that says what and why, never attended densely."""

import copy
import warnings

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, BertConfig, BertModel, DynamicCache
from transformers.generation.continuous_batching.cache import PagedAttentionCache
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.llama import modeling_llama

from flash_dmattn_hf import DynamicMaskCache, DynamicMaskConfig, dynamic_mask_config, iter_gates
from flash_dmattn_hf.gates.attach import attach, detach, plan
from flash_dmattn_hf.integration import attention
from flash_dmattn_hf.integration.attention import dynamic_mask_attention_forward

from ..converted import converted
from ..tiny import FAMILIES, tiny_config, tiny_model, tokens

_SMALL = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "pad_token_id": 0,
}
_MLA = {"kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
_EXPERTS = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_group": 1, "topk_group": 1}
_GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "rotary_dim": 8, "n_inner": 32, "vocab_size": 99}

_NOT_DISPATCHED = "never calls the attention interface|has no class for flash_dmattn"
_BY_NAME = "it chooses its attention class by the name of the implementation"

REFUSED = {
    "deepseek_v32": ({**_MLA, **_EXPERTS, "index_n_heads": 2, "index_head_dim": 8}, "indexer"),
    "falcon": ({}, _BY_NAME),
    **({} if "gptj" in FAMILIES else {"gptj": (_GPT, _BY_NAME)}),
    "gpt_neo": (
        {"num_layers": 2, "num_heads": 4, "attention_types": [[["global"], 2]]},
        _BY_NAME,
    ),
    "bloom": ({"n_layer": 2, "n_head": 4}, _NOT_DISPATCHED),
    "mpt": ({"d_model": 32, "n_heads": 4, "n_layers": 2}, _NOT_DISPATCHED),
    "mamba": ({"state_size": 4}, "must have causal attention modules"),
    "bert": ({}, "not causal"),
    "bigbird_pegasus": (
        {"d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 32},
        r"BigBirdPegasusDecoderAttention is not causal \(is_causal=False\), like cross-attention",
    ),
    "jetmoe": (
        {"num_key_value_heads": 2, "kv_channels": 8, "num_local_experts": 4, "activation_function": "silu"},
        "after they are cached",
    ),
    "git": ({"vision_config": {**_SMALL, "image_size": 16, "patch_size": 8}}, "has no class for flash_dmattn"),
}


@pytest.mark.parametrize("model_type", REFUSED)
def test_refused_families(model_type):
    values, sentence = REFUSED[model_type]
    config = CONFIG_MAPPING[model_type](**{**_SMALL, **values})
    with pytest.raises(ValueError, match=sentence):
        model = AutoModelForCausalLM.from_config(config, attn_implementation="flash_dmattn")
        model(tokens())


@pytest.mark.parametrize("model_type", ["t5", "bart"])
def test_encoder_decoders_are_refused_as_such(model_type):
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 4, "vocab_size": 99}
    config = CONFIG_MAPPING[model_type](**sizes, decoder_start_token_id=0)
    with torch.device("meta"), pytest.raises(ValueError, match="it is an encoder-decoder"):
        model = AutoModelForSeq2SeqLM.from_config(config, attn_implementation="flash_dmattn")
        model(input_ids=torch.ones(1, 4, dtype=torch.long), decoder_input_ids=torch.ones(1, 4, dtype=torch.long))


@pytest.mark.parametrize("model_type", ["bloom", "deepseek_v32"])
def test_refused_families_are_refused_while_loading(model_type, tmp_path):
    values, sentence = REFUSED[model_type]
    AutoModelForCausalLM.from_config(CONFIG_MAPPING[model_type](**{**_SMALL, **values})).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=sentence):
        AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="flash_dmattn")


def test_a_model_without_causal_attention_is_refused_at_its_first_forward():
    config = BertConfig(**_SMALL, attn_implementation="flash_dmattn")
    model = BertModel(config)
    with pytest.raises(ValueError, match="BertModel cannot use flash_dmattn.*not causal"):
        model(tokens())


def test_set_attn_implementation_on_a_refused_model():
    values, sentence = REFUSED["deepseek_v32"]
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING["deepseek_v32"](**{**_SMALL, **values}))
    with pytest.raises(ValueError, match=sentence):
        model.set_attn_implementation("flash_dmattn")


def test_output_attentions_is_refused():
    with pytest.raises(ValueError, match="output_attentions|eager"):
        converted()(tokens(), output_attentions=True)


def test_a_refused_call_leaves_nothing_behind():
    model = converted()
    expected = model(tokens(), use_cache=False).logits
    cache = DynamicMaskCache(model)
    with pytest.raises(ValueError, match="output_attentions|eager"):
        model(tokens(), past_key_values=cache, output_attentions=True)
    assert torch.equal(model(tokens(), use_cache=False).logits, expected)


def test_tokens_that_were_never_attended_to_leave_nothing_behind():
    model = converted()
    expected, cache = model(tokens(), use_cache=False).logits, DynamicMaskCache(model)
    model.set_attn_implementation("sdpa")
    with pytest.raises(RuntimeError, match="never attended to by flash_dmattn"):
        model(tokens(), past_key_values=cache)
    model.set_attn_implementation("flash_dmattn")
    assert torch.equal(model(tokens(), use_cache=False).logits, expected)


def test_deterministic_algorithms_are_passed_on(monkeypatch):
    given, attend = [], attention.dynamic_mask_attention

    def record(*tensors, **options):
        given.append(options["deterministic"])
        return attend(*tensors, **options)

    monkeypatch.setattr(attention, "dynamic_mask_attention", record)
    model = converted()
    model(tokens(), use_cache=False)
    torch.use_deterministic_algorithms(True)
    try:
        model(tokens(), use_cache=False)
    finally:
        torch.use_deterministic_algorithms(False)
    assert given == [False] * (len(given) // 2) + [True] * (len(given) // 2) and given


UNSUPPORTED = {
    **dict.fromkeys(["sinks", "position_bias", "indices", "block_indices"], torch.zeros(4)),
    "cache": PagedAttentionCache.__new__(PagedAttentionCache),  # of pages, which are not ours
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_arguments_that_would_change_the_result_are_refused(name):
    module = converted().model.layers[0].self_attn
    query, key = torch.zeros(1, 4, 5, 8), torch.zeros(1, 2, 5, 8)
    with pytest.raises(ValueError, match="does not support"):
        dynamic_mask_attention_forward(module, query, key, key, None, **{name: UNSUPPORTED[name]})


def test_a_cache_that_an_attention_module_passes_on_is_no_continuous_batching():
    """Modules that pass on all arguments they do not name pass their cache, which they have updated by then."""
    module = converted().model.layers[0].self_attn
    query, key = torch.zeros(1, 4, 5, 8), torch.zeros(1, 2, 5, 8)
    out, _ = dynamic_mask_attention_forward(module, query, key, key, None, cache=DynamicCache())
    assert out.shape == (1, 5, 4, 8)


def test_another_sliding_window_than_the_configured_one_is_refused():
    for window, found in ((12, "12"), (None, "None")):
        model = converted("mistral")
        model.config.sliding_window = window
        with pytest.raises(ValueError, match=f"sliding_window of layer 0 must be 10, .* got {found}"):
            model(tokens())


def test_latent_attention_of_another_make_is_refused():
    model = tiny_model("llama")
    model.model.layers[1].self_attn.kv_lora_rank = 8
    with pytest.raises(ValueError, match=r"LlamaAttention is multi-head latent attention \(MLA\) without expand_kv"):
        attach(model, plan(model, DynamicMaskConfig()))


def test_values_of_some_heads_are_refused():
    module = converted().model.layers[0].self_attn
    query, key = torch.zeros(1, 2, 5, 8), torch.zeros(1, 1, 5, 8)
    with pytest.raises(ValueError, match=r"value of layer 0 must have shape \(B, 2, S, 8\), got \(1, 1, 5, 8\)"):
        dynamic_mask_attention_forward(module, query, key, key, None)


class SilentAttention(modeling_llama.LlamaAttention):
    """Mentions ALL_ATTENTION_FUNCTIONS but never calls what it finds there."""

    def forward(self, hidden_states, position_embeddings=None, **kwargs):
        return hidden_states, None


def test_an_attached_module_that_is_never_called_raises():
    model = converted()
    layer = model.model.layers[1]
    silent = SilentAttention(model.config, 1).double()
    silent.dma = copy.deepcopy(layer.self_attn.dma)
    layer.self_attn = silent
    with pytest.raises(RuntimeError, match="layers.1.self_attn of LlamaModel .* never called"):
        model(tokens())


def test_the_check_of_the_first_forward_removes_itself():
    model = converted()
    assert any(module._forward_hooks for module in model.modules())
    model(tokens())
    assert not any(module._forward_hooks for module in model.modules())


def test_attach_needs_something_to_attach_to():
    empty = _Wrapper(tiny_config("llama"))
    with pytest.raises(ValueError, match="must have causal attention modules"):
        attach(empty, plan(empty, DynamicMaskConfig().resolve()))


class _Wrapper(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config


def test_attach_reports_and_detach_removes():
    model = tiny_model("gemma2")
    planned = plan(model, DynamicMaskConfig(keep_window_size=16).resolve())
    assert not list(iter_gates(model)), "planning changes nothing"
    report = attach(model, planned)
    assert report.attached == ["model.layers.1.self_attn"]
    assert list(report.skipped) == ["model.layers.0.self_attn"]
    assert "sliding window of 10" in report.skipped["model.layers.0.self_attn"]
    detach(model)
    assert not list(iter_gates(model)) and not any(".dma." in name for name in model.state_dict())


@pytest.mark.parametrize("layers", [[7], [0, 7]], ids=str)
def test_layers_that_do_not_exist_are_refused(layers):
    with dynamic_mask_config(layers=layers), pytest.raises(ValueError, match=r"layers"):
        model = AutoModelForCausalLM.from_config(tiny_config("llama"), attn_implementation="flash_dmattn")
        model(tokens())


def test_dense_models_are_left_alone():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not list(iter_gates(AutoModelForCausalLM.from_config(tiny_config("llama"))))
