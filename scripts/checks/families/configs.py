"""A tiny config for any causal model of transformers: its defaults, shrunk by the names of their fields."""

import dataclasses
import re
from typing import Any

from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from checks.families.overrides import OVERRIDES, REQUIRED
from checks.families.sizes import HEAD_DIM, SLIDING_WINDOW, VOCAB_SIZE

SIZES: list[tuple[str, int]] = [
    (r"(?!type_).*vocab_size(_per_layer_input)?", VOCAB_SIZE),
    (r"(hidden_size_per_layer_input)", 8),
    (r"(?!image|video|audio|num|.*token).*(hidden_size|d_model|n_embd|emb_dim|embedding_dim|lru_width)", 64),
    (r"(embedding_size|input_embedding_size|output_embedding_size|word_embed_proj_dim|d_inner)", 64),
    (r"(attention_hidden_size|.*_embed_dim|hidden_dim|embed_dim|out_hidden_size)", 64),
    (r"(num_hidden_layers|n_layers?|num_layers|layers|(num_)?(en|de)coder_layers|depth|num_blocks)", 2),
    (r"(num_|n_|decoder_|encoder_|num_decoder_|num_encoder_|swa_num_)?(attention_)?heads?", 4),
    (r"(mamba_n_heads|n_mamba_heads|mamba_num_heads)", 4),
    (r"(mamba_d_head|mamba_head_dim|mamba_headdim)", 32),
    (r"(mamba_d_ssm)", 128),
    (r"(n_groups|mamba_n_groups|mamba_ngroups)", 1),
    (r"(chunk_size|mamba_chunk_size|index_topk|index_block_size)", 16),
    (r"(linear_num_value_heads|linear_num_heads|linear_num_key_heads|index_n_heads)", 4),
    (r"(swa_)?(num_key_value_heads|num_kv_heads|swa_num_key_value_heads)", 2),
    (r"(swa_)?(head_dim|v_head_dim|index_head_dim|linear_\w*head_dim|kv_channels|dim_head|d_head)", HEAD_DIM),
    (r"(attention_head_size|global_head_dim|attention_head_dim|linear_head_dim|head_size)", HEAD_DIM),
    (r"(.*intermediate_size.*|.*ffn_dim|ffn_hidden_size|dff|dim_ff|.*ffn_hidden_size|feed_forward_size|n_inner)", 32),
    (r"(n_positions|n_ctx|max_.*position.*|max_seq_len|context_length|max_source_positions|model_max_length)", 512),
    (r"(num_experts|n_routed_experts|num_local_experts|moe_num_experts)", 4),
    (r"(num_experts_per_tok(en)?|moe_topk|moe_k|top_k_experts)", 2),
    (r"(n_group|topk_group|num_expert_group|first_k_dense_replace|num_dense_layers|moe_layer_start_index)", 1),
    (r"(kv_lora_rank|q_lora_rank|o_lora_rank|qk_nope_head_dim|laurel_rank|gated_norm_rank|hc_lowrank)", 16),
    (r"(qk_rope_head_dim)", HEAD_DIM),
    (r"(rotary_dim|time_step_rank|mamba_dt_rank|d_rel|mamba_d_state|state_size|ssm_state_size)", 8),
    (r"(.*sliding_window(_size)?|local_attention|window_size|attention_window_size)", SLIDING_WINDOW),
    (r"(attention_chunk_size)", SLIDING_WINDOW),
    (r"(image_size)", 16),
    (r"(patch_size)", 8),
    (r"(pad_token_id)", 0),
    (r"(bos_token_id)", 1),
    (r"(eos_token_id)", 2),
]
"""Names of integer fields, and the size that a tiny model has there. The first that fits decides."""

_PER_LAYER = re.compile(
    r"(layer_types|mlp_layer_types|layers_block_type|indexer_types|no_rope_layers|layer_rope_theta|intermediate_size|"
    r"activation_sparsity_pattern|num_attention_heads_per_layer|attn_layers)"
)


def tiny_config(model_type: str) -> PreTrainedConfig:
    """Returns a config of the model type that makes a model of a few thousand weights, without dropout."""
    cls = CONFIG_MAPPING[model_type]
    small = shrunk(cls(**REQUIRED.get(model_type, {})))
    return cls(**merge(merge(small, REQUIRED.get(model_type, {})), OVERRIDES.get(model_type, {})))


def shrunk(config: PreTrainedConfig) -> dict[str, Any]:
    """Returns arguments that make a small config of the class of `config`, one with every kind of its layers."""
    declared = [field.name for field in dataclasses.fields(config)]
    fields = {name: value for name in declared if (value := vars(config).get(name)) is not None}
    result = {name: small for name, value in fields.items() if (small := _small(name, value)) is not None}
    if "num_key_value_heads" in fields and fields["num_key_value_heads"] == fields.get("num_attention_heads"):
        result["num_key_value_heads"] = result.get("num_attention_heads")
    if (fields.get("v_head_dim") or 0) < (fields.get("head_dim") or 0) and "v_head_dim" in fields:
        result["v_head_dim"] = HEAD_DIM // 2
    for name in config.sub_configs:
        if isinstance(part := fields.get(name), PreTrainedConfig):
            result[name] = {**shrunk(part), "model_type": part.model_type}
    lists = {name: value for name, value in fields.items() if isinstance(value, list)}
    per_layer = {name: value for name, value in lists.items() if _PER_LAYER.fullmatch(name)}
    if per_layer:
        chosen = _representatives([values for name, values in per_layer.items() if "type" in name])
        shortest = min(map(len, per_layer.values()))
        chosen = [index for index in chosen if index < shortest] or list(range(min(2, shortest)))
        for name, values in per_layer.items():
            small = [values[index] for index in chosen]
            result[name] = [_small(name, value) or value for value in small] if "type" not in name else small
        if "num_hidden_layers" in fields:
            result["num_hidden_layers"] = len(chosen)
    rope = fields.get("rope_parameters")
    if isinstance(rope, dict) and "rope_theta" in rope and _has_sections(config, rope):
        result["rope_parameters"] = {**rope, "mrope_section": _sections(rope, fields)}
    return result


def merge(base: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Returns `base` with the values of `other`, those of dicts inside it one by one."""
    result = dict(base)
    for name, value in other.items():
        is_part = isinstance(value, dict) and isinstance(result.get(name), dict)
        result[name] = merge(result[name], value) if is_part else value
    return result


def _small(name: str, value: Any) -> Any:
    if name == "is_decoder":
        return True
    if isinstance(value, float):
        return 0.0 if re.search(r"drop(?!.*token)", name) and value else None
    if isinstance(value, list) and name.endswith("token_id"):
        value = value[0]
    if not isinstance(value, int) or isinstance(value, bool):
        return None
    for pattern, size in SIZES:
        if re.fullmatch(pattern, name):
            return size if value > 0 or name.endswith("token_id") else None
    if re.fullmatch(r"\w*token_(id|index)", name) and value >= VOCAB_SIZE:
        return 3
    return None


def _representatives(lists: list[list]) -> list[int]:
    """Returns the first index of every combination of entries; at least two indices."""
    rows = list(zip(*lists, strict=False))
    chosen = sorted({rows.index(row) for row in rows})
    return chosen if len(chosen) > 1 else list(range(min(2, len(rows))))


def _has_sections(config: PreTrainedConfig, rope: dict) -> bool:
    """Whether positions of images have several axes, each with its share of a head; the model may have the default."""
    return "mrope_section" in rope or "mrope_section" in (getattr(config, "ignore_keys_at_rope_validation", None) or ())


def _sections(rope: dict, fields: dict) -> list[int]:
    pairs = int(HEAD_DIM * rope.get("partial_rotary_factor", fields.get("partial_rotary_factor") or 1.0)) // 2
    width, height = pairs // 3, pairs // 3
    return [pairs - width - height, width, height]
