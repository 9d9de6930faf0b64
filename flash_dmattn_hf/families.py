"""Which attention modules qualify for dynamic masks, which stay as they are, and why the rest is refused."""

import inspect
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from torch import nn

from flash_dmattn_hf.config import DynamicMaskConfig


@dataclass(frozen=True)
class AttentionShape:
    """num_heads, num_kv_heads: heads of query and of key and value. head_dim: of the values.
    sliding_window: the layer's own window in tokens, None for full attention."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    sliding_window: int | None


@dataclass(frozen=True)
class Verdict:
    """What happens to an attention module.

    kind: "attach"; "native" (keeps its own attention, by rule); "refuse" (cannot be right: an error).
    reason: one sentence, empty for "attach". shape: set for "attach" only.
    """

    kind: str
    reason: str = ""
    shape: AttentionShape | None = None


def is_attention(module: nn.Module) -> bool:
    """True for modules that transformers calls attention, by the name of their class."""
    return type(module).__name__.endswith("Attention")


@lru_cache(maxsize=None)
def uses_attention_interface(cls: type) -> bool:
    """True if the class or one of its bases looks its attention function up in the attention interface."""
    return "ALL_ATTENTION_FUNCTIONS" in _source(cls)


def is_native_doge(module: nn.Module) -> bool:
    """True for the attention of transformers' own Doge, which has an importance of its own."""
    cls = type(module)
    return cls.__name__ == "DogeAttention" and cls.__module__.startswith("transformers.")


def judge(module: nn.Module, settings: DynamicMaskConfig) -> Verdict:
    """Says what happens to an attention module under these settings."""
    name = type(module).__name__
    config = getattr(module, "config", None)
    if not uses_attention_interface(type(module)):
        return Verdict("refuse", f"{name} never calls the attention interface, so it would stay dense")
    if config is None:
        return Verdict("refuse", f"{name} has no config to read its shape from")
    if is_native_doge(module):
        return Verdict("attach", shape=read_shape(module))
    if getattr(module, "is_causal", None) is not True:
        return Verdict("refuse", f"{name} is not causal: only causal self-attention has dynamic masks")
    if getattr(module, "layer_idx", None) is None:
        return Verdict("refuse", f"{name} has no layer_idx, so no cache can know its layer")
    if reason := _unsupported_feature(module, config):
        return Verdict("refuse", f"{name} {reason}")
    shape = read_shape(module)
    if settings.layers is not None and module.layer_idx not in settings.layers:
        return Verdict("native", f"layer {module.layer_idx} is not among layers={list(settings.layers)}")
    window = shape.sliding_window
    if window is not None and window <= settings.keep_window_size:
        return Verdict(
            "native",
            f"its sliding window of {window} is not above keep_window_size={settings.keep_window_size}",
        )
    return Verdict("attach", shape=shape)


def _unsupported_feature(module: nn.Module, config: Any) -> str | None:
    """Returns what the module needs and dynamic masks do not have, None if there is nothing."""
    if getattr(module, "sinks", None) is not None:
        return "adds attention sinks (s_aux) to its softmax, which is not supported"
    if any(hasattr(module, name) for name in ("kv_lora_rank", "kv_b_proj", "kv_a_proj_with_mqa")):
        return "is multi-head latent attention (MLA), which is not supported"
    if any("indexer" in name for name, _ in module.named_children()):
        return "chooses its keys with an indexer of its own, which is not supported"
    if getattr(module, "is_kv_shared_layer", False) or getattr(config, "num_kv_shared_layers", 0):
        return "shares key and value between layers (num_kv_shared_layers), which is not supported"
    if _layer_type(module) == "chunked_attention":
        return "attends within chunks (attention_chunk_size), which is not supported"
    if any("cross" in name for name, _ in module.named_children()) or getattr(
        module, "is_cross_attention", False
    ):
        return "is cross-attention, which is not supported"
    return None


def read_shape(module: nn.Module) -> AttentionShape:
    """Reads heads, head dim of the values and sliding window of a causal attention module."""
    config = module.config
    num_heads = _first(module, ("num_heads", "num_attention_heads", "n_heads"))
    if num_heads is None:
        num_heads = _first(config, ("num_attention_heads", "n_head", "num_heads"))
    num_kv_heads = _first(module, ("num_key_value_heads", "num_kv_heads"))
    if num_kv_heads is None and (groups := _first(module, ("num_key_value_groups",))) is not None:
        num_kv_heads = num_heads // groups
    if num_kv_heads is None:
        num_kv_heads = num_heads
    head_dim = _first(module, ("v_head_dim", "head_dim", "head_size", "attention_head_size"))
    if head_dim is None:
        head_dim = config.hidden_size // num_heads
    projection = getattr(module, "v_proj", None)
    out_features = getattr(projection, "out_features", None)
    if out_features is not None and out_features % head_dim == 0:
        num_kv_heads = out_features // head_dim
    return AttentionShape(num_heads, num_kv_heads, head_dim, sliding_window_of(module))


def sliding_window_of(module: nn.Module) -> int | None:
    """Returns the sliding window in tokens of an attention module, None for full attention."""
    config = module.config
    layer_type = _layer_type(module)
    if layer_type is not None and "sliding" not in layer_type:
        return None
    window = getattr(module, "sliding_window", None)
    if window is None:
        window = getattr(config, "sliding_window", None)
    return window or None


def _layer_type(module: nn.Module) -> str | None:
    layer_types = getattr(module.config, "layer_types", None)
    layer_idx = getattr(module, "layer_idx", None)
    if not layer_types or layer_idx is None or layer_idx >= len(layer_types):
        return None
    return layer_types[layer_idx]


def _first(owner: Any, names: tuple[str, ...]) -> int | None:
    for name in names:
        if isinstance(value := getattr(owner, name, None), int):
            return value
    return None


@lru_cache(maxsize=None)
def _source(cls: type) -> str:
    texts = []
    for base in cls.__mro__:
        if base.__module__.startswith("torch.") or base is object:
            continue
        try:
            texts.append(inspect.getsource(base))
        except (OSError, TypeError):
            continue
    return "\n".join(texts)
