"""Which attention modules qualify for dynamic masks, which stay as they are, and why the rest is refused."""

import inspect
import re
from dataclasses import dataclass
from functools import cache
from typing import Any

from torch import nn

from flash_dmattn_hf.config import DynamicMaskConfig
from flash_dmattn_hf.gates.hidden_states import takes_hidden_states

INTERFACE = "ALL_ATTENTION_FUNCTIONS"
"""What the source of a class mentions if it looks its attention function up by name."""

_OTHER_STATES = frozenset({"key_value_states", "encoder_hidden_states", "cross_attention_states"})
_CACHE_UPDATE = re.compile(r"(?:past_key_values?|cache)\.update\(\s*([^()]*?),?\s*\)")
_HARMLESS_ARGUMENTS = frozenset(
    "query key value attention_mask scaling dropout softcap sliding_window is_causal position_ids "
    "output_attentions cu_seq_lens_q cu_seq_lens_k max_length_q max_length_k s_aux".split()
)


@dataclass(frozen=True)
class AttentionShape:
    """num_heads, num_kv_heads: heads of query and of key and value. head_dim: of the values.
    hidden_size: of what the projections read, None if it is not known.
    is_latent: whether the layer caches latents, of which it makes keys and values afterwards.
    sliding_window: the layer's own window in tokens, None for full attention."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    hidden_size: int | None
    sliding_window: int | None
    is_latent: bool = False


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
    """True for modules that transformers calls attention, or MLA, by the name of their class."""
    cls = type(module)
    return re.search(r"(Attention|MLA)\d*$", cls.__name__) is not None and not cls.__module__.startswith("torch.")


def uses_attention_interface(module: nn.Module) -> bool:
    """True if the module's class looks its attention function up in the attention interface."""
    return INTERFACE in _source(type(module))


def chooses_class_by_name(cls: type) -> bool:
    """True if the file of a model class looks its attention class up by the name of the implementation."""
    pattern = r"\b(?!\w*VISION)\w*ATTENTION_CLASSES\[(?:config\._)?attn_implementation\]"
    return re.search(pattern, _module_source(cls)) is not None


def is_cross_attention(module: nn.Module) -> bool:
    """True for attention to other tokens than its own, such as those of an encoder or an image.

    Its class says so, or takes the states of other tokens and is not causal.
    """
    if _is_named_cross(module):
        return True
    return getattr(module, "is_causal", None) is False and _takes_other_states(type(module))


def _is_named_cross(module: nn.Module) -> bool:
    return "Cross" in type(module).__name__ or getattr(module, "is_cross_attention", False) is True


def is_native_doge(module: nn.Module) -> bool:
    """True for the attention of transformers' own Doge, which has an importance of its own."""
    cls = type(module)
    return cls.__name__ == "DogeAttention" and cls.__module__.startswith("transformers.")


def is_causal(module: nn.Module) -> bool:
    """True for attention that calls itself causal, or that leaves it to the mask of its model, which is looked at.

    The latter is the text of PaliGemma: its prefix is bidirectional, its suffix causal. In the files of such models the
    setting does nothing else.
    """
    if getattr(module, "is_causal", None) is True:
        return True
    setting = "use_bidirectional_attention"
    return getattr(module.config, setting, None) is True and _module_source(type(module)).count(setting) == 1


def judge(module: nn.Module, settings: DynamicMaskConfig, text_config: Any) -> Verdict:
    """Says what happens to an attention module of the text model with this config, under these settings."""
    name = type(module).__name__
    if not uses_attention_interface(module):
        return _judge_without_interface(module, text_config)
    if is_cross_attention(module):
        kind = "cross-attention" if _is_named_cross(module) else "not causal (is_causal=False), like cross-attention"
        return Verdict("native", f"{name} is {kind}: only causal self-attention has dynamic masks")
    if getattr(module, "config", None) is None:
        return Verdict("refuse", f"{name} has no config to read its shape from")
    if reason := _unsupported_feature(module):
        return Verdict("refuse", f"{name} {reason}")
    if not is_native_doge(module) and not is_causal(module):
        return Verdict("refuse", f"{name} is not causal: only causal self-attention has dynamic masks")
    if getattr(module, "layer_idx", None) is None:
        return Verdict("refuse", f"{name} has no layer_idx, so no cache can know its layer")
    if getattr(module, "is_kv_shared_layer", False):
        share_all = getattr(module.config, "num_kv_shared_layers", 0) == module.config.num_hidden_layers
        source = "keys and values of another model" if share_all else "keys, values and importance of an earlier layer"
        return Verdict("native", f"layer {module.layer_idx} shares the {source}")
    if (chunk_size := chunk_size_of(module)) is not None:
        return Verdict("native", f"layer {module.layer_idx} attends within chunks of {chunk_size} tokens")
    if settings.layers is not None and module.layer_idx not in settings.layers:
        return Verdict("native", f"layer {module.layer_idx} is not among layers={list(settings.layers)}")
    shape = read_shape(module)
    if settings.importance_input == "hidden" and (reason := _lacks_hidden_states(module, shape)):
        return Verdict("refuse", f'{name} {reason}, so importance_input must be "value"')
    window = shape.sliding_window
    keep = settings.window_of(module.layer_idx)
    if window is not None and window <= keep:
        return Verdict("native", f"its sliding window of {window} is within keep_window_size={keep}")
    return Verdict("attach", shape=shape)


def _judge_without_interface(module: nn.Module, text_config: Any) -> Verdict:
    name = type(module).__name__
    if any(is_attention(child) and uses_attention_interface(child) for child in list(module.modules())[1:]):
        return Verdict("native", f"{name} only wraps the attention inside it")
    if "linear" in (_layer_type(module, text_config) or ""):
        return Verdict("native", f"{name} is linear attention")
    if getattr(module, "layer_idx", None) is None and getattr(module, "is_causal", None) is not True:
        reason = f"{name} never calls the attention interface, nor says that it is causal self-attention"
        return Verdict("native", reason)
    return Verdict("refuse", f"{name} never calls the attention interface, so it would stay dense")


def _unsupported_feature(module: nn.Module) -> str | None:
    """Returns what the module does that dynamic masks do not support, None if there is nothing."""
    config, source = module.config, _source(type(module))
    if getattr(module, "sinks", None) is not None and "s_aux=" not in source:
        return "has attention sinks that it does not pass to its attention function, which is not supported"
    if hasattr(module, "compressor"):
        return "compresses older keys into keys of its own, which is not supported"
    if any("indexer" in name for name, _ in module.named_children()):
        return "chooses its keys with an indexer of its own, which is not supported"
    if not _is_latent(module) and any(hasattr(module, name) for name in ("kv_lora_rank", "kv_b_proj")):
        return "is multi-head latent attention (MLA) without expand_kv, which is not supported"
    if getattr(config, "num_kv_shared_layers", 0) and not hasattr(module, "store_full_length_kv"):
        return "shares key and value between layers (num_kv_shared_layers) in a way that is not known"
    if len(calls := _interface_calls(source)) > 1:
        return "calls the attention interface more than once per layer, which is not supported"
    for name in re.findall(r"^\s*(\w+)=", calls[0] if calls else "", re.MULTILINE):
        if name not in _HARMLESS_ARGUMENTS:
            return f"passes {name} to its attention function, which is not supported"
    if any("self.layer_idx" not in re.split(r",\s*", call) for call in _CACHE_UPDATE.findall(source)):
        return "caches its keys under another index than its layer_idx, which is not supported"
    if re.search(r"(key|value)_states = (key|value)_states\.repeat\(", source):
        return "repeats its keys and values after they are cached, which is not supported"
    return None


def _lacks_hidden_states(module: nn.Module, shape: AttentionShape) -> str | None:
    """Returns why no importance can be computed from the hidden states of a module, None if it can."""
    if is_native_doge(module):
        return "computes its importance from the values"
    if shape.hidden_size is None or not takes_hidden_states(module):
        return "is not called with hidden_states of a known size first"
    return None


def _interface_calls(source: str) -> list[str]:
    """Returns the argument lists of the calls of the attention function that a class makes."""
    return re.findall(r"= attention_interface\(\n(.*?)\n\s+\)\n", source, re.DOTALL)


def read_shape(module: nn.Module) -> AttentionShape:
    """Reads heads, head dim of the values and sliding window of a causal attention module."""
    config = module.config
    num_heads = _first(module, "num_heads", "num_attention_heads", "n_heads")
    if num_heads is None:
        num_heads = _first(config, "num_attention_heads", "n_head", "num_heads")
    head_dim = _first(module, "v_head_dim", "head_dim", "head_size", "attention_head_size")
    if head_dim is None:
        head_dim = config.hidden_size // num_heads
    num_kv_heads = _first(module, "num_key_value_heads", "num_kv_heads")
    if num_kv_heads is None:
        num_kv_heads = num_heads // (_first(module, "num_key_value_groups") or 1)
    if _is_latent(module):
        num_kv_heads = num_heads  # whatever the config says, every head has a key and a value of its own
    width = getattr(getattr(module, "v_proj", None), "out_features", None)
    if width is not None and width % head_dim == 0:
        num_kv_heads = width // head_dim
    hidden_size = getattr(getattr(module, "q_proj", None), "in_features", None) or _first(config, "hidden_size")
    window = sliding_window_of(module)
    return AttentionShape(num_heads, num_kv_heads, head_dim, hidden_size, window, _is_latent(module))


def _is_latent(module: nn.Module) -> bool:
    """True for multi-head latent attention (MLA), which caches latents and expands all of them in every forward."""
    return "self.expand_kv(" in _source(type(module))


def sliding_window_of(module: nn.Module) -> int | None:
    """Returns the sliding window in tokens of an attention module, None for full attention.

    A wrong guess is noticed: the attention function compares it with what the model's mask says.
    """
    cls, config = type(module), module.config
    window = getattr(module, "sliding_window", None) or getattr(config, "sliding_window", None)
    if layer_type := _layer_type(module, config):
        return window if window and "sliding" in layer_type else None
    mentioned = "sliding_window" in _source(cls) or "create_sliding_window_causal_mask" in _module_source(cls)
    return window if window and mentioned else None


def chunk_size_of(module: nn.Module) -> int | None:
    """Returns the chunk size in tokens of an attention module that attends within chunks, None for every other."""
    config = module.config
    return config.attention_chunk_size if _layer_type(module, config) == "chunked_attention" else None


def _layer_type(module: nn.Module, config: Any) -> str | None:
    layer_types = getattr(config, "layer_types", None)
    layer_idx = getattr(module, "layer_idx", None)
    if not layer_types or layer_idx is None or layer_idx >= len(layer_types):
        return None
    return layer_types[layer_idx]


def _first(owner: Any, *names: str) -> int | None:
    for name in names:
        if isinstance(value := getattr(owner, name, None), int):
            return value
    return None


@cache
def _takes_other_states(cls: type) -> bool:
    return not _OTHER_STATES.isdisjoint(inspect.signature(cls.forward).parameters)


@cache
def _source(cls: type) -> str:
    """Returns the source of a class and its bases, without those of torch."""
    texts = []
    for base in cls.__mro__:
        if base is object or base.__module__.startswith("torch."):
            continue
        try:
            texts.append(inspect.getsource(base))
        except (OSError, TypeError):
            continue
    return "\n".join(texts)


@cache
def _module_source(cls: type) -> str:
    """Returns the source of the file that defines a class."""
    try:
        return inspect.getsource(inspect.getmodule(cls))
    except (OSError, TypeError):
        return ""
