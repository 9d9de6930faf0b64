"""Which slots a model's layers need to serve requests: the formula of its memory."""

from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel

from flash_dmattn.calls import Slots
from flash_dmattn.slots import make_slots
from flash_dmattn_hf.config import Windows
from flash_dmattn_hf.gates.attach import attention_modules, num_decoder_layers, text_config_of
from flash_dmattn_hf.gates.eligibility import chunk_size_of, is_cross_attention, read_shape
from flash_dmattn_hf.gates.importance import get_gate


class ServedLayer(NamedTuple):
    """One attention layer: its windows, the heads of its slots, the head dims of keys and values.

    is_shared: whether later layers use its keys. slot_dtype: as in `flash_dmattn.slots.make_slots`.
    """

    windows: Windows
    num_heads: int
    head_dim: int
    value_dim: int
    is_shared: bool
    slot_dtype: torch.dtype | None = None

    def make_slots(self, num_rows: int, dtype: torch.dtype, device: torch.device | str) -> Slots:
        """Returns empty slots for so many requests."""
        sizes = num_rows, self.num_heads, self.windows.keep_window_size, self.head_dim
        return make_slots(*sizes, dtype, device, self.value_dim, self.slot_dtype)

    def bytes_per_request(self, dtype: torch.dtype) -> int:
        """Returns the bytes of one request's slots, exactly."""
        return sum(state.nbytes for state in self.make_slots(1, dtype, "meta"))


def served_layers(model: PreTrainedModel, slot_dtype: torch.dtype | None = None) -> dict[int, ServedLayer]:
    """Returns the attention layers of a model by layer_idx. slot_dtype: of their slots.

    Layers of dynamic masks have their windows. Native sliding-window layers have as many slots as their window has
    tokens. Those that use the keys of an earlier layer have none and are not returned. Raises ValueError for a layer
    whose memory would grow with the text, that attends within chunks or to an encoder or image, that is not causal, or
    that is not attention.
    """
    config = text_config_of(model)
    layers: dict[int, ServedLayer] = {}
    sharing = set()
    for name, module, owner in attention_modules(model):
        if getattr(module, "config", owner) is not config:
            continue
        if getattr(module, "is_causal", None) is False and not is_cross_attention(module):
            raise ValueError(
                f"continuous batching needs causal attention, got {type(model).__name__}, whose {name} calls itself "
                "bidirectional (use_bidirectional_attention), and a request does not say which tokens are its prefix: "
                "call model.generate() with token_type_ids"
            )
        is_shared = getattr(module, "store_full_length_kv", False)
        if getattr(module, "is_kv_shared_layer", False):
            sharing.add(module.layer_idx)
        elif (gate := get_gate(module)) is not None:
            num_heads = max(gate.num_kv_heads, gate.num_importance_heads)
            head_dims = _key_dim(module, gate), gate.head_dim
            layers[module.layer_idx] = ServedLayer(gate.windows, num_heads, *head_dims, is_shared)
        else:
            layers[module.layer_idx] = _native_layer(name, module, is_shared)
    missing = sorted(set(range(num_decoder_layers(model))) - set(layers) - sharing)
    if missing:
        raise ValueError(
            f"continuous batching needs attention in every layer, got {type(model).__name__}, whose layers {missing} "
            "hold another state"
        )
    return {index: layer._replace(slot_dtype=slot_dtype) for index, layer in layers.items()}


def _native_layer(name: str, module: Any, is_shared: bool) -> ServedLayer:
    if is_cross_attention(module):
        raise ValueError(
            f"continuous batching brings a request nothing but tokens of text, got {name}, which attends to the states "
            "of an encoder or an image"
        )
    if (chunk_size := chunk_size_of(module)) is not None:
        raise ValueError(
            f"continuous batching has slots for the last tokens of a text, not for those of a chunk, got {name}, which "
            f"attends within chunks of {chunk_size} tokens: call model.generate()"
        )
    shape = read_shape(module)
    window = shape.sliding_window
    if window is None:
        raise ValueError(
            f"continuous batching needs an importance gate or a sliding window in every layer, got {name} without "
            "either: its keys grow with the text"
        )
    windows = Windows(window, 0, window, None)
    return ServedLayer(windows, shape.num_kv_heads, _key_dim(module, shape), shape.head_dim, is_shared)


def _key_dim(module: Any, shape: Any) -> int:
    """Returns the head dim of the keys; shape: what knows that of the values, and whether the layer makes latents."""
    return module.qk_head_dim if shape.is_latent else getattr(module, "head_dim", shape.head_dim)
