"""What every kernel for masks and biases is launched with."""

import torch
import triton

from flash_dmattn.backends.device import strides
from flash_dmattn.calls import DenseCall
from flash_dmattn.dense.tiles import mask_arguments, tensor_arguments


def shared_arguments(call: DenseCall) -> tuple:
    """Returns tensors, numbers and strides in the order of the kernels' parameters."""
    return (
        call.query,
        call.key,
        call.value,
        *mask_arguments(call),
        *tensor_arguments(call.attn_bias, call),
        call.softmax_scale,
        call.softcap,
        *strides(call),
        call.query.shape[1],
        call.key.shape[1],
    )


def constants(call: DenseCall) -> dict:
    head_dim = call.query.shape[-1]
    mask = call.attn_mask
    return {
        "KV_HEADS": call.key.shape[2],
        "GROUP": call.group_size,
        "MASK_BATCHES": 1 if mask is None else mask.shape[0],
        "MASK_HEADS": 1 if mask is None else mask.shape[1],
        "BIAS_HEADS": 1 if call.attn_bias is None else call.attn_bias.shape[1],
        "HEAD_DIM": head_dim,
        "BLOCK_D": max(16, triton.next_power_of_2(head_dim)),
        "HAS_MASK": mask is not None,
        "HAS_BIAS": call.attn_bias is not None,
        "HAS_SOFTCAP": call.softcap > 0,
        "IS_CAUSAL": call.is_causal,
        "PRECISION": "ieee" if call.query.dtype == torch.float32 else "tf32",
    }
