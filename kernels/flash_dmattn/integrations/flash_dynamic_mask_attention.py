"""Attention as a model of Hugging Face Transformers calls it, with a mask and a bias of its own."""

import torch

from flash_dmattn.arguments import accept_aliases
from flash_dmattn.dense.functions import flash_dmattn_func
from flash_dmattn.utils.mask import create_mask


@accept_aliases(keep_window_size="window_size")
def flash_dynamic_mask_attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    attention_bias: torch.Tensor | None,
    scaling: float | None = None,
    window_size: int | None = None,
    softcap: float | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """Attends under a mask and a bias, and, beyond `window_size` keys, to the keys of the highest bias only.

    module: its `is_causal` decides, True when it has none.
    query: (B, H, Sq, D). key, value: (B, Hkv, Sk, D).
    attention_mask: bool, True where a key may be seen, (B, Sk) or (1 or B, heads or 1, 1 or Sq, 1 or Sk); or None.
    attention_bias: (1 or B, heads or 1, 1 or Sq, Sk), or (1 or B, heads or 1, Sk) for one that is the same for all
        queries; added to the logits; or None.
    scaling: None: D ** -0.5.
    window_size: most keys that a query sees; None: all. Also named keep_window_size. Needs a bias to rank the keys.
    softcap: as in `flash_dmattn_func`.
    kwargs: `is_causal` overrides the module's, `dropout` must be 0, the rest is of no concern here.

    Returns out (B, Sq, H, D), and None for attention weights, which are not written down.
    Raises ValueError for arguments that do not fit.
    """
    is_causal = kwargs.get("is_causal")
    is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    batch, _, seqlen_q, _ = query.shape
    seqlen_k = key.shape[2]
    if attention_bias is not None and attention_bias.dim() == 3:
        attention_bias = attention_bias[:, :, None]
    if window_size is not None and seqlen_k > window_size:
        if attention_bias is None:
            raise ValueError(f"attention_bias must be a tensor when window_size is {window_size}, got None")
        lowest = torch.finfo(attention_bias.dtype).min
        attention_mask = create_mask(
            attention_bias, attention_mask, batch, seqlen_q, seqlen_k, window_size, lowest, is_causal=is_causal
        )
    elif attention_mask is not None and attention_mask.dim() == 2:
        attention_mask = attention_mask[:, None, None] != 0
    out = flash_dmattn_func(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        attention_mask,
        attention_bias,
        scale=scaling,
        is_causal=is_causal,
        softcap=softcap,
        dropout_p=kwargs.get("dropout") or 0.0,
    )
    return out, None
