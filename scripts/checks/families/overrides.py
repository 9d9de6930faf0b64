"""What the rules for tiny configs cannot guess: a line per model type."""

from typing import Any

from checks.families.sizes import HEAD_DIM

_HEAD_DIM = {"head_dim": HEAD_DIM}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_SHARED_PAIRS = {
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_kv_shared_layers": 2,
}
_GEMMA3N = {**_SHARED_PAIRS, "intermediate_size": [32] * 4, "activation_sparsity_pattern": [0.0] * 4}
_QSA = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": HEAD_DIM,
    "indexer_budget": 8,
    "indexer_compress_ratio": 4,
    "ple_embed_dim": 64,
}
_ATTENTION_LAST = {"attn_layer_period": 2, "attn_layer_offset": 1}
_LINEAR_AND_FULL = ["linear_attention", "full_attention"]

REQUIRED: dict[str, dict[str, Any]] = {
    "gemma4_assistant": {"text_config": {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}},
}
"""Model type -> arguments without which its config cannot be made at all."""

_SLIDING_ONLY = {"sliding_window": 30}
_COHERE_COMPASS = {
    "layer_types": ["sliding_attention", "full_attention"],
    "rope_parameters": dict.fromkeys(["sliding_attention", "full_attention"], {**_ROPE, "mrope_section": [4, 2, 2]}),
}
_PINPOINTS = {"image_grid_pinpoints": [[16, 16]]}
_VISION_OF_32 = {"vision_config": {"image_size": [32, 32], "patch_size": [8, 8]}}
_PIXTRAL = {"vision_config": {"image_size": 32}}
_WINDOWED = {"vision_config": {"window_size": 32, "fullatt_block_indexes": [1]}}
_QFORMER = {"num_query_tokens": 4, "text_config": {"model_type": "opt"}}
_TINY_TIMM = {"vision_config": {"architecture": "test_convnext", "hidden_size": 64}}
_VISIBLE = {"vision_config": {"initializer_range": 0.02}}
_FOUR_TOKENS = {"mm_tokens_per_image": 4}
_IMAGE_TOKEN = {"image_token_id": 3}
_NO_MODALITY_TWICE = {
    **{"image_token_id": 3, "video_token_id": 96, "audio_token_id": 97},
    **{"vision_start_token_id": 95, "audio_start_token_id": 98},
}

OVERRIDES: dict[str, dict[str, Any]] = {
    "apertus1p5": {
        **{"image_token_id": 3, "audio_token_id": 4, "image_token_offset": 83, "audio_token_offset": 91},
        "audio_config": {"codebook_dim": 64, "codebook_size": 8},
        "vision_config": {
            **{"codebook_size": 8, "embed_dim": 32, "latent_channels": 32, "base_channels": 32},
            **{"channel_multiplier": [1, 1, 2, 2], "num_res_blocks": 1},
        },
    },
    "bamba": {"attn_layer_indices": [1]},
    "blt": {
        "encoder_hash_byte_group_vocab": 99,
        "encoder_config": {"hidden_size_global": 64},
        "decoder_config": {"hidden_size_global": 64},
    },
    "aria": {"projector_patch_to_query_dict": {"4": 4}},
    "chameleon": {
        "vocabulary_map": {"<image>": 3, **{f"IMGIMG{letter}Z": 10 + i for i, letter in enumerate("ABCDEFGH")}},
        "vq_config": {
            "num_embeddings": 8,
            "base_channels": 32,
            "channel_multiplier": [1, 1, 2, 2],
            "num_res_blocks": 1,
        },
    },
    "cohere_compass_text": _COHERE_COMPASS,
    "cohere_compass": {"text_config": _COHERE_COMPASS},
    "deepseek_ocr2": {
        "text_config": {"mlp_layer_types": ["dense", "sparse"], "n_routed_experts": 4, "num_experts_per_tok": 2},
        "vision_config": {"sam_config": {"downsample_channels": [32, 64], "initializer_range": 0.02}},
    },
    "deepseek_vl_hybrid": {"high_res_vision_config": {"global_attn_indexes": [0]}},
    "diffusion_gemma": {"text_config": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 16}},
    "emu3": {
        "vocabulary_map": {
            "<image>": 3,
            "<|extra_200|>": 4,
            **{f"<|visual token {i:06d}|>": 10 + i for i in range(8)},
        },
        "vq_config": {"codebook_size": 8, "base_channels": 32, "channel_multiplier": [1, 1, 2, 2], "num_res_blocks": 1},
    },
    "ernie4_5_vl_moe": {"text_config": {"rope_parameters": {**_ROPE, "mrope_section": [3, 3, 2]}}},
    "exaone4_5": {**_WINDOWED, **_IMAGE_TOKEN},
    "fast_vlm": _TINY_TIMM,
    "gemma3": _FOUR_TOKENS,
    "got_ocr2": _VISIBLE,
    "pp_chart2table": _VISIBLE,
    "granite_docling": {"vision_config": {"scale_factor": 2}},
    "granite4_vision": {
        **_PINPOINTS,
        "deepstack_layer_map": [[-1, 0]],
        "spatial_target_layers": [1],
        "downsample_rate": "1/2",
    },
    "hunyuan_vl": {"text_config": _HEAD_DIM},
    "hyperclovax_vision_v2": _WINDOWED,
    "idefics2": {"text_config": _SLIDING_ONLY, "perceiver_config": {"resampler_n_latents": 4}},
    "blip-2": {"num_query_tokens": 4, **_IMAGE_TOKEN, **_VISIBLE},
    "instructblip": {"num_query_tokens": 4, "image_token_index": 3, **_VISIBLE},
    "instructblipvideo": {"num_query_tokens": 1, "image_token_id": 3, "video_token_index": 3, **_VISIBLE},
    "llama4": {
        "vision_config": {
            "vision_output_dim": 64,
            "projector_input_dim": 64,
            "projector_output_dim": 64,
            "intermediate_size": 256,
        },
    },
    "minicpm_ocr": _IMAGE_TOKEN,
    "minicpmv4_6": _IMAGE_TOKEN,
    "minicpmv4_7": _IMAGE_TOKEN,
    "muse_glimmer": {"out_hidden_size": 256},
    "inkling_mm_model": {
        "vision_config": {"text_hidden_size": 64, "num_hidden_layers": 6, "patch_size": 4},
        "audio_config": {"text_hidden_size": 64},
    },
    "internvl": _VISION_OF_32,
    "qianfan_ocr": _VISION_OF_32,
    "janus": {"vision_config": {"projection_dim": 64}, "vq_config": {"base_channels": 32, "num_embeddings": 8}},
    "lighton_ocr": _PIXTRAL,
    "llava_next": _PINPOINTS,
    "llava_next_video": _PINPOINTS,
    "llava_onevision": _PINPOINTS,
    "mistral3": _PIXTRAL,
    "mllama": {
        "text_config": {"cross_attention_layers": [1]},
        "vision_config": {"intermediate_layers_indices": [0], "vision_output_dim": 128},
    },
    "molmo2": {
        "image_patch_id": 3,
        "adapter_config": {"vision_feature_layer": [-1, -2]},
        "vision_config": {"image_size": [16, 16]},
    },
    "muse_spark": {"audio_config": {"num_hidden_layers": 4}, "out_hidden_size": 256},
    "nemotron_h_omni": {"vision_config": {"video_temporal_patch_size": 2}, **_IMAGE_TOKEN},
    "paddleocr_vl": {"text_config": {"rope_parameters": {**_ROPE, "mrope_section": [4, 2, 2]}}},
    "paligemma": {"projection_dim": 64},
    "perception_lm": {
        "vision_config": {
            "architecture": "vit_pe_core_tiny_patch16_384",
            "model_args": {"embed_dim": 64, "depth": 1, "num_heads": 4, "img_size": [32, 32], "patch_size": 16},
        }
    },
    "qwen2_5_omni_thinker": {**_WINDOWED, **_NO_MODALITY_TWICE},
    "qwen2_5_vl": _WINDOWED,
    "qwen3_omni_moe_thinker": _NO_MODALITY_TWICE,
    "shieldgemma2": _FOUR_TOKENS,
    "step3p7": {"text_config": {"sliding_window": 10}},
    "unlimited_ocr": {"text_config": _SLIDING_ONLY},
    "vipllava": {"vision_feature_layers": [-1, -2, -1, -2, -1]},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 32},
    },
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots3_note": {
        "vision_config": {"adapter_in_dim": 64, "adapter_out_dim": 64},
        "audio_config": {"adapter_input_size": 64, "adapter_out_dim": 64},
    },
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "gemma3n_text": _GEMMA3N,
    "gemma3n": {"text_config": _GEMMA3N, **_TINY_TIMM, "vision_soft_tokens_per_image": 1},
    "gemma4_text": _SHARED_PAIRS,
    "gemma4": {
        "text_config": _SHARED_PAIRS,
        "vision_config": {
            **{"hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4},
            **{"num_key_value_heads": 4, "head_dim": 16, "patch_size": 8, "position_embedding_size": 8},
        },
    },
    "gemma4_unified": {
        "vision_config": {"patch_size": 8, "mm_embed_dim": 64, "mm_posemb_size": 8, "output_proj_dims": 64},
    },
    "musicgen": {"decoder": {"num_codebooks": 1}},
    "musicgen_melody": {"decoder": {"num_codebooks": 1}},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": _LINEAR_AND_FULL},
    "hunyuan_v1_dense": _HEAD_DIM,
    "hunyuan_v1_moe": _HEAD_DIM,
    "jamba": _ATTENTION_LAST,
    "kosmos-2": {"latent_query_num": 4},
    "kosmos-2.5": {"latent_query_num": 4, "vision_config": {"patch_embed_hidden_size": 192}},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8},
    "ministral": {**_HEAD_DIM, **_SLIDING_ONLY},
    "mistral": _SLIDING_ONLY,
    "nemotron": {**_HEAD_DIM, "num_key_value_heads": 2},
    "qwen4_exp_text": _QSA,
    "qwen4_exp": {"text_config": _QSA},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"], "attention_window_size": 30},
    "reformer": {"axial_pos_shape": (16, 32), "axial_pos_embds_dim": (32, 32)},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
        "layers_block_type": ["linear_attention", "hybrid", "hybrid"],
        "num_hidden_layers": 3,
    },
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid", "hybrid"], "num_hidden_layers": 3},
    "zaya": {"num_experts_per_tok": 1},
}
"""Model type -> fields of its config that the rules cannot guess."""
