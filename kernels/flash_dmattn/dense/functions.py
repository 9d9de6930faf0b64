"""The functions of flash_dmattn with an arbitrary mask and bias: plain, packed, and of one backend each."""

import functools
from collections.abc import Callable

import torch

from flash_dmattn.arguments import accept_aliases
from flash_dmattn.dense.attention import dense_attention
from flash_dmattn.dispatch import DENSE_ATTENTION, announce, explain_backends


@accept_aliases(q="query", k="key", v="value", softmax_scale="scale")
def flash_dmattn_func(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    attn_bias: torch.Tensor | None = None,
    scale: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    deterministic: bool | None = None,
    return_attn_probs: bool | None = None,
    *,
    dropout_p: float = 0.0,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor, None]:
    """Attends under a mask and a bias, with gradients to query, key, value and the bias.

    query: (B, Sq, H, D), float16, bfloat16 or float32, any D up to 256; float64 and any D on the reference backend.
    key, value: (B, Sk, Hkv, D), query's dtype; H is a multiple of Hkv.
    attn_mask: (1 or B, 1 or Hkv or H, 1 or Sq, 1 or Sk), bool, or 1.0 / 0.0; zero hides a key. None: all visible.
        A mask that many calls share may be a `TiledMask`, see `flash_dmattn.utils.mask.tile_mask`.
    attn_bias: of such a shape, floating point, added to the logits. None: nothing. Its gradient is summed over what is
        broadcast. Neither is expanded in memory, and without a query dimension both take O(N) memory.
    scale: factor of the dot product; None: D ** -0.5. Also named softmax_scale.
    is_causal: query i sees no key after i + Sk - Sq; None: False.
    softcap: logits are softcap * tanh(logits / softcap) before the bias; None or 0: off.
    deterministic: equal inputs give bitwise equal gradients; None: False.
    return_attn_probs: return (out, lse, None) instead of out; lse (B, H, Sq), natural log.
    dropout_p: 0.

    query, key, value may be named q, k, v. The backend follows the tensors, one for GPUs for tensors on a GPU, or
    is the one that FLASH_DMATTN_BACKEND names.

    Returns out (B, Sq, H, D); 0 for a query that sees no key, with lse -inf and no gradient.
    Raises ValueError for arguments that do not fit, TypeError for an argument and its alias.
    """
    return _attend(
        query, key, value, attn_mask, attn_bias, scale, is_causal, softcap, deterministic, return_attn_probs, dropout_p
    )


@accept_aliases(query="q", softmax_scale="scale")
def flash_dmattn_kvpacked_func(
    q: torch.Tensor,
    kv: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    attn_bias: torch.Tensor | None = None,
    scale: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    deterministic: bool | None = None,
    return_attn_probs: bool | None = None,
    *,
    dropout_p: float = 0.0,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor, None]:
    """`flash_dmattn_func` with key and value in one tensor, which is not copied.

    q: (B, Sq, H, D). kv: (B, Sk, 2, Hkv, D). The rest, what is returned and raised, as there.
    """
    key, value = unpack("kv", kv, 2, 2)
    return _attend(
        q, key, value, attn_mask, attn_bias, scale, is_causal, softcap, deterministic, return_attn_probs, dropout_p
    )


@accept_aliases(softmax_scale="scale")
def flash_dmattn_qkvpacked_func(
    qkv: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    attn_bias: torch.Tensor | None = None,
    is_causal: bool | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    deterministic: bool | None = None,
    return_attn_probs: bool | None = None,
    *,
    dropout_p: float = 0.0,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor, None]:
    """`flash_dmattn_func` with query, key and value in one tensor, which is not copied.

    qkv: (B, S, 3, H, D). The rest, what is returned and raised, as there; note that is_causal stands before scale.
    """
    query, key, value = unpack("qkv", qkv, 3, 2)
    return _attend(
        query, key, value, attn_mask, attn_bias, scale, is_causal, softcap, deterministic, return_attn_probs, dropout_p
    )


@accept_aliases(q="query", k="key", v="value", softmax_scale="scale")
def triton_dmattn_func(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    attn_bias: torch.Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
) -> torch.Tensor:
    """`flash_dmattn_func` on the Triton backend; RuntimeError where that cannot serve."""
    return _attend(query, key, value, attn_mask, attn_bias, scale, is_causal, backend="triton")


@accept_aliases(q="query", k="key", v="value", softmax_scale="scale")
def flex_dmattn_func(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    attn_bias: torch.Tensor | None = None,
    is_causal: bool | None = True,
    scale: float | None = None,
) -> torch.Tensor:
    """`flash_dmattn_func` on torch's FlexAttention, causal by default; RuntimeError where that cannot serve."""
    is_causal = True if is_causal is None else is_causal
    return _attend(query, key, value, attn_mask, attn_bias, scale, is_causal, backend="flex")


@accept_aliases(q="query", k="key", v="value", softmax_scale="scale")
def reference_dmattn_func(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    attn_bias: torch.Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
) -> torch.Tensor:
    """`flash_dmattn_func` in plain torch, on any device."""
    return _attend(query, key, value, attn_mask, attn_bias, scale, is_causal, backend="reference")


def flash_dmattn_func_auto(backend: str | None = None, **kwargs) -> Callable:
    """Returns the attention function of a backend, with `kwargs` bound to it if there are any.

    backend: "cuda" for `flash_dmattn_func`, whose backend follows its tensors; "triton", "flex" or "reference"; None:
        the best, `flash_dmattn_func`.

    Raises ValueError for an unknown backend, RuntimeError for "triton" or "flex" where it cannot run. "cuda" is given
    without a GPU as well, so that the same code runs on a CPU; that is said once, at INFO.
    """
    functions = {
        "cuda": flash_dmattn_func,
        "triton": triton_dmattn_func,
        "flex": flex_dmattn_func,
        "reference": reference_dmattn_func,
    }
    if backend not in (None, *functions):
        raise ValueError(f"backend must be None or one of {list(functions)}, got {backend!r}")
    reason = explain_backends()["triton" if backend == "cuda" else backend or "reference"]
    if reason is not None and backend == "cuda":
        announce(DENSE_ATTENTION, "reference", f"no GPU backend: {reason}")
    elif reason is not None:
        raise RuntimeError(f"backend {backend!r} is not available: {reason}")
    function = functions[backend or "cuda"]
    return functools.partial(function, **kwargs) if kwargs else function


def unpack(name: str, packed: torch.Tensor, count: int, dim: int) -> tuple[torch.Tensor, ...]:
    """Splits dimension `dim` of a packed tensor, the third from behind, without a copy."""
    if not isinstance(packed, torch.Tensor):
        raise ValueError(f"{name} must be a tensor, got {type(packed).__name__}")
    if packed.dim() != dim + 3 or packed.shape[dim] != count:
        leading = ", ".join(("B", "S")[-dim:]) if dim > 1 else "total"
        raise ValueError(f"{name} must have shape ({leading}, {count}, heads, D), got {tuple(packed.shape)}")
    return packed.unbind(dim)


def check_dropout(dropout_p: float) -> None:
    if dropout_p:
        raise ValueError(
            f"dropout_p must be 0, got {dropout_p}: attention weights are never written down here; use "
            "torch.nn.functional.scaled_dot_product_attention, or torch.nn.Dropout on the output"
        )


def _attend(
    query,
    key,
    value,
    attn_mask,
    attn_bias,
    scale,
    is_causal,
    softcap=None,
    deterministic=None,
    return_attn_probs=None,
    dropout_p=0.0,
    backend="auto",
):
    check_dropout(dropout_p)
    out, lse = dense_attention(
        query,
        key,
        value,
        attn_mask,
        attn_bias,
        is_causal=bool(is_causal),
        softmax_scale=scale,
        softcap=softcap or 0.0,
        deterministic=bool(deterministic),
        backend=backend,
    )
    return (out, lse, None) if return_attn_probs else out
