"""Tiny float64 models with random importance, and the modes of generation, for the tests of the cache."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from flash_dmattn_hf import dynamic_mask_config, iter_gates

VOCAB = 97
PROMPT = 26
NEW = 16

_SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": None,
    "pad_token_id": 1,
    "initializer_range": 0.2,
}
_LAYER_TYPES = ["sliding_attention", "full_attention"]
_GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512, "resid_pdrop": 0, "embd_pdrop": 0}
_MLA = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": None,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 6,
    "first_k_dense_replace": 2,  # no experts
}

KINDS = {
    "llama-topk": ("llama", {}, {"keep_window_size": 12, "num_sink_tokens": 0, "local_window_size": 0}),
    "llama-sinks-local": ("llama", {}, {"keep_window_size": 16, "num_sink_tokens": 4, "local_window_size": 7}),
    "llama-shares": (
        "llama",
        {},
        {"keep_window_size": 12, "num_sink_tokens": 2, "local_window_size": 4, "window_shares": {0: 0.75, 1: 1.75}},
    ),
    "llama-query-heads": (
        "llama",
        {},
        {"keep_window_size": 12, "num_sink_tokens": 4, "local_window_size": 0, "importance_heads": "query"},
    ),
    "qwen2-sliding-above-w": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 18, "layer_types": _LAYER_TYPES},
        {"keep_window_size": 12, "num_sink_tokens": 0, "local_window_size": 4},
    ),
    "qwen2-sliding-below-w": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 8, "layer_types": _LAYER_TYPES},
        {"keep_window_size": 12, "num_sink_tokens": 4, "local_window_size": 0},
    ),
    "gpt2-mha": (
        "gpt2",
        {**_GPT2, "attn_pdrop": 0},
        {"keep_window_size": 12, "num_sink_tokens": 4, "local_window_size": 4},
    ),
    "deepseek-v3": (
        "deepseek_v3",
        _MLA,
        {"keep_window_size": 12, "num_sink_tokens": 2, "local_window_size": 4},
    ),
    "deepseek-v3-shared": (
        "deepseek_v3",
        _MLA,
        {"keep_window_size": 12, "num_sink_tokens": 2, "local_window_size": 4, "importance_heads": "shared"},
    ),
    "doge": ("doge", {"keep_window_size": 12}, {"keep_window_size": 12}),
}


def make_model(kind, *, seed=0, implementation="flash_dmattn", dtype=torch.float64, **changes):
    """A tiny model whose importances spread widely; `changes` go into its config."""
    model_type, fields, settings = KINDS[kind]
    torch.manual_seed(seed)
    config = AutoConfig.for_model(model_type, **{**_SIZES, **fields, **changes})
    if implementation == "flash_dmattn":
        with dynamic_mask_config(**settings):
            model = AutoModelForCausalLM.from_config(config, attn_implementation=implementation)
        for _, module, gate in iter_gates(model):
            owner = gate if isinstance(gate, torch.nn.Module) else module  # Doge has its own A and dt_proj
            torch.nn.init.normal_(owner.A, std=1.0)
            torch.nn.init.normal_(owner.dt_proj.weight, std=0.5)
    else:
        model = AutoModelForCausalLM.from_config(config, attn_implementation=implementation)
    model.generation_config.pad_token_id = 1
    return model.to(dtype).eval()


def make_prompt(batch=1, length=PROMPT, seed=0):
    """Token ids (B, length), none of them special, and a mask of ones."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, VOCAB, (batch, length), generator=generator)
    return ids, torch.ones_like(ids)


def left_padded_prompt():
    """Three prompts of different lengths."""
    ids, mask = make_prompt(batch=3)
    for row, padding in enumerate((0, 5, 17)):
        ids[row, :padding], mask[row, :padding] = 1, 0
    return ids, mask


def greedy(model, ids, mask, new=NEW, **options):
    return model.generate(ids, attention_mask=mask, max_new_tokens=new, do_sample=False, **options)
