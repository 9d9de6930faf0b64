"""Tiny models with cross-attention beside their self-attention."""

from transformers import BartConfig, BartForCausalLM, MllamaForCausalLM
from transformers.models.mllama.configuration_mllama import MllamaTextConfig

from flash_dmattn_hf import dynamic_mask_config

from .tiny import BASE

_BART = {"vocab_size": 99, "d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 32}


def bart(**settings):
    """The decoder of BART: self-attention and cross-attention in each layer. settings: change the window of 8."""
    return _build(BartForCausalLM, BartConfig(**_BART), settings)


def mllama(**settings):
    """The text model of Mllama: self-attention in layer 0, cross-attention in layer 1."""
    rope = {"rope_type": "default", "rope_theta": 1e4}
    config = MllamaTextConfig(**BASE, cross_attention_layers=[1], rope_parameters=rope)
    return _build(MllamaForCausalLM, config, settings)


def _build(cls, config, settings):
    with dynamic_mask_config(**{"keep_window_size": 8, **settings}):
        return cls._from_config(config, attn_implementation="flash_dmattn").eval()
