"""What the benchmarks of masks and biases share: inputs, engines, and the definition that they are held against."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn.functional import scaled_dot_product_attention

import flash_dmattn
from flash_dmattn.dense.functions import reference_dmattn_func
from flash_dmattn.utils.mask import create_mask

MASKS = ("random", "blocks", "topk", "key", "full")
"""random: half of all pairs, and a bias for each. blocks: some 128 x 128 blocks, no bias. topk: each query's own top
keys by a bias a key, written down. key: the top keys of the whole sequence, a mask and a bias a key. full: a mask that
hides nothing, one for all heads, no bias."""


@dataclass(frozen=True)
class Shape:
    batch: int = 1
    seqlen_q: int = 1024
    seqlen_k: int = 1024
    num_heads: int = 8
    num_kv_heads: int = 2
    head_dim: int = 64
    keep_window_size: int = 256
    is_causal: bool = True
    mask: str = "topk"
    share: float = 0.06
    mask_heads: int | None = None  # of blocks; None: the key heads

    def __str__(self) -> str:
        causal = "causal" if self.is_causal else "whole"
        return (
            f"{self.mask:>6} B={self.batch} {self.seqlen_q}x{self.seqlen_k} {self.num_heads}:{self.num_kv_heads} heads "
            f"of {self.head_dim}, {causal}"
        )


@dataclass
class Inputs:
    """query (B, Sq, H, D); key, value (B, Sk, Hkv, D); mask and bias as `flash_dmattn_func` takes them, or None."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    mask: torch.Tensor | None
    bias: torch.Tensor | None

    def leaves(self) -> list[torch.Tensor]:
        tensors = (self.query, self.key, self.value, self.bias)
        return [tensor.requires_grad_() for tensor in tensors if tensor is not None]


def make_inputs(shape: Shape, device: str, dtype: torch.dtype, seed: int) -> Inputs:
    generator = torch.Generator(device).manual_seed(seed)

    def rand(*sizes):
        return torch.randn(*sizes, generator=generator, device=device).to(dtype)

    query = rand(shape.batch, shape.seqlen_q, shape.num_heads, shape.head_dim)
    key, value = (rand(shape.batch, shape.seqlen_k, shape.num_kv_heads, shape.head_dim) for _ in range(2))
    lanes = (shape.batch, shape.num_kv_heads)
    mask = bias = None
    if shape.mask == "blocks":
        heads = shape.mask_heads or shape.num_kv_heads
        blocks = (shape.batch, heads, math.ceil(shape.seqlen_q / 128), math.ceil(shape.seqlen_k / 128))
        mask = torch.rand(blocks, generator=generator, device=device) < shape.share
        mask = mask.repeat_interleave(128, 2).repeat_interleave(128, 3)[:, :, : shape.seqlen_q, : shape.seqlen_k]
    elif shape.mask == "full":
        mask = torch.ones(1, 1, shape.seqlen_q, shape.seqlen_k, dtype=torch.bool, device=device)
    elif shape.mask == "random":
        bias = rand(*lanes, shape.seqlen_q, shape.seqlen_k)
        mask = torch.rand(bias.shape, generator=generator, device=device) < 0.5
    else:
        bias = rand(*lanes, 1, shape.seqlen_k)
        if shape.mask == "key":
            top = bias.topk(min(shape.keep_window_size, shape.seqlen_k), dim=-1).indices
            mask = torch.zeros_like(bias, dtype=torch.bool).scatter_(-1, top, True)
        else:
            mask = make_topk_mask(shape, bias)
    return Inputs(query, key, value, mask, bias)


def make_topk_mask(shape: Shape, bias: torch.Tensor) -> torch.Tensor:
    return create_mask(
        bias,
        None,
        shape.batch,
        shape.seqlen_q,
        shape.seqlen_k,
        shape.keep_window_size,
        torch.finfo(bias.dtype).min,
        is_causal=shape.is_causal,
    )


def engines(shape: Shape) -> dict[str, Callable[[Inputs], torch.Tensor]]:
    """Returns, by name, functions of inputs that give out (B, Sq, H, D)."""

    def masked(function):
        def run(inputs: Inputs) -> torch.Tensor:
            return function(inputs.query, inputs.key, inputs.value, inputs.mask, inputs.bias, is_causal=shape.is_causal)

        return run

    def intervals(inputs: Inputs) -> torch.Tensor:
        return flash_dmattn.dynamic_mask_attention(
            inputs.query,
            inputs.key,
            inputs.value,
            inputs.bias[:, :, 0],
            keep_window_size=shape.keep_window_size,
            is_causal=shape.is_causal,
        )

    found = {
        "sdpa": lambda inputs: sdpa(shape, inputs),
        "cuda": masked(flash_dmattn.flash_dmattn_func),
        "triton": masked(flash_dmattn.triton_dmattn_func),
        "flex": masked(flash_dmattn.flex_dmattn_func),
        "reference": masked(reference_dmattn_func),
    }
    if shape.mask == "topk":
        found["intervals"] = intervals
    return found


def why_not(engine: str) -> str | None:
    """Returns why an engine cannot run on this machine, or None."""
    if engine == "cuda":
        return None if flash_dmattn.CUDA_AVAILABLE else "there is no GPU backend here"
    return flash_dmattn.explain_backends().get(engine)


def sdpa(shape: Shape, inputs: Inputs) -> torch.Tensor:
    """torch's own attention, mask and bias written down as one (B, H, Sq, Sk) tensor."""
    written = additive(shape, inputs, inputs.query.dtype)
    query, key, value = (tensor.transpose(1, 2) for tensor in (inputs.query, inputs.key, inputs.value))
    return scaled_dot_product_attention(query, key, value, attn_mask=written, enable_gqa=True).transpose(1, 2)


def additive(shape: Shape, inputs: Inputs, dtype: torch.dtype) -> torch.Tensor:
    """Returns mask, bias and causality as numbers to add, (B, H, Sq, Sk); the lowest finite one hides."""
    sizes = (shape.batch, shape.num_kv_heads, shape.seqlen_q, shape.seqlen_k)
    visible = torch.ones(1, 1, *sizes[2:], dtype=torch.bool, device=inputs.query.device)
    if shape.is_causal:
        visible = visible.tril(shape.seqlen_k - shape.seqlen_q)
    if inputs.mask is not None:
        visible = visible & (inputs.mask != 0)
    bias = torch.zeros((), dtype=dtype, device=visible.device) if inputs.bias is None else inputs.bias.to(dtype)
    written = torch.where(visible, bias, torch.finfo(dtype).min)
    written = written.expand(sizes if written.shape[1] == 1 else written.shape)
    return written.repeat_interleave(shape.num_heads // written.shape[1], dim=1)


def definition(shape: Shape, inputs: Inputs) -> torch.Tensor:
    """out (B, Sq, H, D) in float32, the softmax written down; rows that see nothing are 0."""
    written = additive(shape, inputs, torch.float32)
    group = shape.num_heads // shape.num_kv_heads
    query, key, value = (tensor.float().transpose(1, 2) for tensor in (inputs.query, inputs.key, inputs.value))
    key, value = (tensor.repeat_interleave(group, dim=1) for tensor in (key, value))
    logits = query @ key.transpose(-1, -2) * shape.head_dim**-0.5 + written
    sees_any = (written > torch.finfo(torch.float32).min).any(-1, keepdim=True)
    return torch.where(sees_any, logits.softmax(-1) @ value, 0).transpose(1, 2)
