"""Tiny random models of many families, made from nothing but their configs."""

import copy
import inspect

import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.gptj import modeling_gptj

from flash_dmattn_hf.gates.eligibility import INTERFACE

VOCAB_SIZE = 99

BASE = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_HEAD_DIM = {"head_dim": 8}
_MHA = {"num_key_value_heads": 4}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_GPT2 = {
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 256,
    "attn_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "resid_pdrop": 0.0,
}
_NO_DROPOUT = {"attention_dropout": 0.0, "hidden_dropout": 0.0, "dropout": 0.0, "activation_dropout": 0.0}
_FULL_AND_SLIDING = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 10}
_LINEAR = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
}
_MLA = {
    **_MHA,
    "kv_lora_rank": 16,
    "q_lora_rank": None,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
_VISION = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 8,
}
_QWEN3_VISION = {
    "depth": 1,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_heads": 4,
    "out_hidden_size": 32,
    "num_position_embeddings": 16,
    "deepstack_visual_indexes": [0],
}

_SHARED_KEYS = {
    **_HEAD_DIM,
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "sliding_window": 10,
    "num_kv_shared_layers": 2,
    "vocab_size_per_layer_input": VOCAB_SIZE,
    "hidden_size_per_layer_input": 8,
}

FAMILIES: dict[str, dict] = {
    "llama": {},
    "mistral": {"sliding_window": 10},
    "mixtral": {"sliding_window": None, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2": {},
    "qwen2_moe": {**_EXPERTS, "shared_expert_intermediate_size": 16},
    "qwen3": _HEAD_DIM,
    "qwen3_moe": {**_EXPERTS, **_HEAD_DIM},
    "qwen3_next": {**_EXPERTS, **_HEAD_DIM, **_LINEAR, "shared_expert_intermediate_size": 16},
    "phi": {**_MHA, "partial_rotary_factor": 0.5, "resid_pdrop": 0.0},
    "phi3": {"pad_token_id": 0, "sliding_window": None, "resid_pdrop": 0.0},
    "gemma": _HEAD_DIM,
    "gemma2": {**_HEAD_DIM, **_FULL_AND_SLIDING, "attn_logit_softcapping": 5.0},
    "gemma3_text": {**_HEAD_DIM, **_FULL_AND_SLIDING},
    "granite": {},
    "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "olmo": {},
    "olmo2": {},
    "olmo3": _FULL_AND_SLIDING,
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "glm": _HEAD_DIM,
    "glm4": _HEAD_DIM,
    "glm4_moe": {**_HEAD_DIM, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "smollm3": {},
    "cohere": {},
    "cohere2": _FULL_AND_SLIDING,
    "starcoder2": {"sliding_window": 10, "residual_dropout": 0.0, "embedding_dropout": 0.0},
    "stablelm": {},
    "nemotron": {"head_dim": 8},
    "gpt2": _GPT2,
    "gpt_bigcode": {**_GPT2, "multi_query": True},
    "gpt_neox": {"attention_dropout": 0.0, "hidden_dropout": 0.0},
    "opt": {**_NO_DROPOUT, "ffn_dim": 32, "word_embed_proj_dim": 32},
    "biogpt": {"attention_probs_dropout_prob": 0.0, "hidden_dropout_prob": 0.0},
    "persimmon": {"hidden_dropout": 0.0},
    "ernie4_5": {},
    "exaone4": _FULL_AND_SLIDING,
    "gpt_oss": {**_HEAD_DIM, **_FULL_AND_SLIDING, "num_local_experts": 4, "num_experts_per_tok": 2},
    "gemma3n_text": {
        **_SHARED_KEYS,
        "laurel_rank": 4,
        "activation_sparsity_pattern": [0.0] * 4,
        "intermediate_size": [32] * 4,
    },
    "gemma4_text": {**_SHARED_KEYS, "global_head_dim": 8},
    "llama4_text": {
        **_HEAD_DIM,
        "layer_types": ["chunked_attention", "full_attention"],
        "no_rope_layers": [1, 0],
        "attention_chunk_size": 7,
        "num_local_experts": 2,
        "intermediate_size_mlp": 32,
    },
    "seed_oss": {**_HEAD_DIM, "attention_dropout": 0.0, "residual_dropout": 0.0},
    "arcee": {},
    "helium": _HEAD_DIM,
    "apertus": {},
    "bitnet": {},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "falcon_h1": {
        "mamba_d_ssm": 32,
        "mamba_n_heads": 4,
        "mamba_d_head": 8,
        "mamba_d_state": 8,
        "mamba_n_groups": 1,
        "mamba_chunk_size": 8,
    },
    "modernbert-decoder": {
        "layer_types": ["full_attention", "sliding_attention"],
        "local_attention": 10,
    },
    "deepseek_v2": {**_MLA, "head_dim": 4},
    "deepseek_v3": {**_MLA, "q_lora_rank": 16},
    "longcat_flash": {
        **_MLA,
        "num_layers": 1,
        "q_lora_rank": 16,
        "head_dim": 4,
        "ffn_hidden_size": 32,
        "expert_ffn_hidden_size": 16,
        "moe_topk": 2,
        "zero_expert_num": 1,
    },
    "llava": {"text": "llama", "vision": ("clip_vision_model", _VISION)},
    "qwen3_vl": {"text": "qwen3_vl_text", "vision": ("qwen3_vl_vision", _QWEN3_VISION)},
    "idefics3": {"text": "llama", "vision": ("idefics3_vision", _VISION)},
}
if INTERFACE in inspect.getsource(modeling_gptj):  # since transformers 5.24
    FAMILIES["gptj"] = {**_GPT2, "rotary_dim": 4, "n_inner": 32}
"""Model type -> what its config needs beyond small sizes. "text" and "vision" mark composite models."""


def tiny_config(model_type: str, **overrides):
    """Returns a small config of the model type, without any attention implementation chosen."""
    special = copy.deepcopy(FAMILIES.get(model_type, {}))
    if "text" not in special:
        return CONFIG_MAPPING[model_type](**{**BASE, **special, **overrides})
    vision_type, vision = special["vision"]
    return CONFIG_MAPPING[model_type](
        text_config=CONFIG_MAPPING[special["text"]](**{**BASE, **overrides}),
        vision_config=CONFIG_MAPPING[vision_type](**vision),
        image_token_id=VOCAB_SIZE - 1,
    )


def tiny_model(
    model_type: str, *, dtype: torch.dtype = torch.float32, seed: int = 0, **overrides
) -> PreTrainedModel:
    """Returns a random model of the type in eval mode; overrides go to its (text) config."""
    torch.manual_seed(seed)
    return build(tiny_config(model_type, **overrides)).to(dtype).eval()


def build(config, **kwargs) -> PreTrainedModel:
    """Returns a model with language modelling head for a config, whose experts work in float64 too."""
    config._experts_implementation = "eager"
    cls = AutoModelForImageTextToText if hasattr(config, "text_config") else AutoModelForCausalLM
    return cls.from_config(config, **kwargs)


def tokens(batch: int = 2, length: int = 24, *, seed: int = 0) -> torch.Tensor:
    """Returns (batch, length) int64 token ids without special ones."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB_SIZE - 1, (batch, length), generator=generator)
