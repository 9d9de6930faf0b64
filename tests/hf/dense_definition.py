"""The definition of dynamic mask attention written out with N x N tensors, as an attention function of its own.

Registered as "dense_definition": transformers gives it its own full boolean mask, so what masks our integration
recognises is checked as well. A model switched to it keeps its gates, and only their parameters are used here.
"""

import contextlib

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

NAME = "dense_definition"
SHARED = {}
"""Layer type -> importance, gate and index of the layer whose keys later layers share."""

HIDDEN_STATES = {}
"""Attention module -> what it was called with, while `by_definition` runs a model."""


def importance_of(gate, tokens):
    """(B, Hi, S) from the equation of the design, in the gate's own parameters; tokens: (B, S, features)."""
    owner = gate if hasattr(gate, "A") else gate.module
    dt = F.linear(tokens, owner.dt_proj.weight, owner.dt_proj.bias)
    importance = owner.A * F.softplus(dt)
    if gate.config.importance == "zoh":
        importance = importance.exp()
    return importance.transpose(1, 2)


def visible(importance, real, settings, layer=None):
    """(B, Hi, S, S) bool: may query t see key j, by counting for every pair the keys that beat j.

    Nothing is said against later keys: the mask of the model shows those of a block alone.
    layer: index of the one that made the keys, which may have a share of its own; None: it has none.
    """
    w, s, r = settings.keep_window_size, settings.num_sink_tokens, settings.local_window_size
    if settings.window_shares and layer in settings.window_shares:
        w = round(w * settings.window_shares[layer])
    position = real.long().cumsum(-1) - 1
    t, j = position[:, None, :, None], position[:, None, None, :]
    ahead = importance[..., None, :] > importance[..., :, None]  # [j, i]: i beats j
    tie = importance[..., None, :] == importance[..., :, None]
    newer = position[:, None, None, :] > position[:, None, :, None]
    beats = (ahead | tie & newer) & real[:, None, None, :]
    old_enough = (j >= s) & (t - j >= r) & real[:, None, None, :]  # [t, i]: i competes at t
    count = (old_enough.double() @ beats.double().transpose(-1, -2)).long()  # [t, j]
    chosen = (j >= s) & (t - j >= r) & (count < w - s - r)
    return ((j < s) | (t - j < r) | chosen) & real[:, None, None, :]


def dense_definition(module, query, key, value, attention_mask, scaling=None, softcap=None, s_aux=None, **kwargs):
    """out (B, T, H, D): softmax over everything the mask and the definition let through."""
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    groups = query.shape[1] // key.shape[1]
    logits = query @ key.repeat_interleave(groups, 1).transpose(-1, -2) * scaling
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    allowed = attention_mask
    if attention_mask is None or attention_mask.is_floating_point():  # of cross-attention
        allowed = torch.ones_like(logits, dtype=torch.bool) if attention_mask is None else attention_mask == 0
    gate = getattr(module, "dma", None)
    importance, layer = None, getattr(module, "layer_idx", None)
    if gate is not None:
        is_hidden = gate.config.importance_input == "hidden"
        importance = importance_of(gate, HIDDEN_STATES[module] if is_hidden else value.transpose(1, 2).flatten(2))
    if getattr(module, "store_full_length_kv", False):
        SHARED[module.layer_type] = importance, gate, layer
    if getattr(module, "is_kv_shared_layer", False):
        importance, gate, layer = SHARED[module.layer_type]
    if importance is not None:
        real = attention_mask[:, 0].diagonal(dim1=-2, dim2=-1)
        seen = visible(importance.detach(), real, gate.config, layer)
        repeat = query.shape[1] // importance.shape[1]
        allowed = allowed & seen.repeat_interleave(repeat, 1)
        if gate.config.add_importance_bias:
            logits = logits + importance.repeat_interleave(repeat, 1)[:, :, None, :]
    logits = logits.masked_fill(~allowed, -torch.inf)
    if s_aux is not None:  # a key with a value of 0
        logits = torch.cat([logits, s_aux.to(logits.dtype)[:, None, None].expand(*logits.shape[:3], 1)], -1)
    weights = logits.softmax(-1).nan_to_num(0.0)[..., : key.shape[2]]
    out = weights @ value.repeat_interleave(groups, 1)
    return out.transpose(1, 2).contiguous(), None


def _remember(module, args, kwargs):
    HIDDEN_STATES[module] = kwargs.get("hidden_states", args[0] if args else None)


def _full_mask(*args, **kwargs):
    return sdpa_mask(*args, **{**kwargs, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False})


@contextlib.contextmanager
def by_definition(model):
    """Runs the model with the definition instead of the package."""
    AttentionInterface.register(NAME, dense_definition)
    AttentionMaskInterface.register(NAME, _full_mask)
    config = model.config.get_text_config()
    before = config._attn_implementation
    config._attn_implementation_internal = NAME
    hooks = [
        module.register_forward_pre_hook(_remember, with_kwargs=True)
        for module in model.modules()
        if hasattr(module, "dma")
    ]
    try:
        yield
    finally:
        HIDDEN_STATES.clear()
        SHARED.clear()
        for hook in hooks:
            hook.remove()
        config._attn_implementation_internal = before
        AttentionInterface._global_mapping.pop(NAME)
        AttentionMaskInterface._global_mapping.pop(NAME)
