"""Native Doge: its own A and dt_proj give the importance, and its forward builds no N x N tensor."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import nn

from flash_dmattn_hf.arguments import by_name, parameter_names, pop_cache
from flash_dmattn_hf.config import DynamicMaskConfig
from flash_dmattn_hf.forms import PAPER_FORM
from flash_dmattn_hf.gates.importance import Gate, compute_importance
from flash_dmattn_hf.names import is_ours


class DogeGate(Gate):
    """The gate of a DogeAttention; it owns no parameters and reads the module's."""

    starts_dense = False

    def __init__(self, module: nn.Module, shape: Any, config: DynamicMaskConfig) -> None:
        if config.importance_heads != "kv":
            raise ValueError(f'importance_heads must be "kv" for native Doge, got {config.importance_heads!r}')
        self.module = module
        self.model_config = module.config
        self.layer_idx = module.layer_idx
        self.config = config
        self.num_kv_heads = self.num_importance_heads = shape.num_kv_heads
        self.head_dim = shape.head_dim
        self.sliding_window = shape.sliding_window

    def __call__(self, value: torch.Tensor) -> torch.Tensor:
        """value: (B, Hkv, S, D). Returns the importance (B, Hkv, S) in float32, float64 for float64 values."""
        exact = not self.module.training
        return compute_importance(value, self._project, self.module.A, self.config.importance, exact=exact)

    def _project(self, tokens: torch.Tensor) -> torch.Tensor:
        projection = self.module.dt_proj
        bias = None if projection.bias is None else projection.bias.to(tokens.dtype)
        return nn.functional.linear(tokens, projection.weight.to(tokens.dtype), bias)


def native_config(config: Any) -> DynamicMaskConfig:
    """Returns the settings of a DogeConfig: the paper's mask and form, no sinks, no local window."""
    return DynamicMaskConfig(
        keep_window_size=config.keep_window_size,
        num_sink_tokens=0,
        local_window_size=0,
        importance=PAPER_FORM,
        dt_proj_bias=config.attention_bias,
    )


def wrap_forward(original: Callable) -> Callable:
    """Returns DogeAttention.forward with a branch that hands key and value over without building a mask."""
    from transformers.models.doge import modeling_doge

    names = parameter_names(original)[1:]

    @wraps(original)
    def forward(self, *args, **kwargs):
        if getattr(self, "dma", None) is None or not is_ours(self.config._attn_implementation):
            return original(self, *args, **kwargs)
        given = by_name(names, args, kwargs)
        hidden_states, position_embeddings = given.pop("hidden_states"), given.pop("position_embeddings")
        attention_mask, cache = given.pop("attention_mask", None), pop_cache(given)
        input_shape = hidden_states.shape[:-1]
        heads_shape = (*input_shape, -1, self.head_dim)
        query = self.q_norm(self.q_proj(hidden_states).view(heads_shape)).transpose(1, 2)
        key = self.k_norm(self.k_proj(hidden_states).view(heads_shape)).transpose(1, 2)
        value = self.v_proj(hidden_states).view(heads_shape).transpose(1, 2)
        query, key = modeling_doge.apply_rotary_pos_emb(query, key, *position_embeddings)
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        attend = modeling_doge.ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
        out, weights = attend(
            self,
            query,
            key,
            value,
            attention_mask=attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **given,
        )
        return self.o_proj(out.reshape(*input_shape, -1)), weights

    return forward
