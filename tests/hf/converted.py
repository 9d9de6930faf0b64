"""Tiny float64 models with dynamic masks and random importance."""

import torch

from flash_dmattn_hf import dynamic_mask_config, iter_gates

from .tiny import build, tiny_config

WINDOW = {"keep_window_size": 8, "num_sink_tokens": 2, "local_window_size": 3}


def converted(model_type="llama", *, seed=0, **values):
    """Returns a model of a family of `tiny` in eval mode, its importance far from zero; values change WINDOW."""
    torch.manual_seed(seed)
    with dynamic_mask_config(**{**WINDOW, **values}):
        model = build(tiny_config(model_type), attn_implementation="flash_dmattn").double().eval()
    with torch.no_grad():
        for _, _, gate in iter_gates(model):
            gate.A.normal_()
            gate.dt_proj.weight.normal_()
    return model
