"""The public attention functions: attention over intervals, and the whole of Dynamic Mask Attention."""

import torch

from flash_dmattn import arguments, planned
from flash_dmattn.arguments import accept_aliases
from flash_dmattn.blocks import Blocks
from flash_dmattn.calls import AttentionCall
from flash_dmattn.dispatch import ATTENTION, check_backend_name, choose, differentiates_itself
from flash_dmattn.interval_arguments import check_query_rows, check_soft, check_visibility
from flash_dmattn.ops import run_attention
from flash_dmattn.selection import clamp_windows, select_visible
from flash_dmattn.soft_selection import cut_softly, num_visible
from flash_dmattn.visibility import NEVER, SoftCut, Visibility


def interval_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    importance: torch.Tensor | None,
    visibility: Visibility | None,
    *,
    query_start: int | torch.Tensor | None = None,
    query_positions: torch.Tensor | None = None,
    soft: SoftCut | None = None,
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    add_importance_bias: bool = True,
    max_visible: int | None = None,
    dropout_p: float = 0.0,
    dropout_seed: torch.Tensor | None = None,
    deterministic: bool = False,
    return_lse: bool = False,
    backend: str = "auto",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attends, for each query row t, to the keys with birth <= t < death.

    logit(t, j) = softcap(softmax_scale * q_t . k_j) + importance_j, softmax over the visible keys. The keys may
    stand in any order. With `soft`, log sigmoid(score_j - threshold_t) is added from the row contested_from_j on.

    query: (B, Sq, H, D), float16, bfloat16, float32 or float64.
    key: (B, Sk, Hkv, D), value: (B, Sk, Hkv, Dv), query's dtype; H is a multiple of Hkv. Where D and Dv differ, the
        shorter one is filled up with zeros for the backend.
    importance: (B, Hi, Sk) floating point, Hi = Hkv, H, or 1 for all heads alike, added to the logits in float32 (NaN
        as -inf, +inf as the largest float32; a key of -inf weighs 0), or None for no bias. GPU backends add 2.3e38 at
        most, and a key below -2.3e38 weighs 0.
    visibility: birth and death, int32 (B, Hi, Sk); or None: every key from its own row on, as in dense attention.
    query_start: the row of the first query, an int or int32 (B,), the others follow; None: Sk - Sq.
    query_positions: (B, Sq) int32, the row of every query instead, in any order, -1 for one that sees nothing. With
        query_start as well it is a promise that rows follow each other from there on, -1 aside: keys that are born at
        their own numbers are then listed fastest.
    soft: a differentiable gate on pairs of query and key, score (B, Hi, Sk), threshold (B, Hi, Sq) and contested_from
        (B, Hi, Sk); or None. The CUDA library and FlexAttention do not serve it.
    softmax_scale: None: D ** -0.5.
    softcap: logits are softcap * tanh(logits / softcap) before the bias; 0 is off.
    add_importance_bias: when False the importance is not added and has no gradient.
    max_visible: n consecutive rows see no more than max_visible + n keys altogether (the w of a causal selection), a
        promise that saves a GPU backend from counting them; None: it counts.
    dropout_p: how likely each weight of the softmax is dropped, at least 0 and below 1; what is kept is divided by
        1 - dropout_p. lse does not know of it. The CUDA library and FlexAttention do not serve it.
    dropout_seed: (B,) int64, which weights are dropped (`flash_dmattn.dropout.keeps`); None: drawn from torch's
        generator of query's device.
    deterministic: equal inputs give bitwise equal gradients.
    return_lse: also return the natural-log sum of exp of each query's logits.
    backend: "auto" or one of `get_available_backends()`.

    Returns out (B, Sq, H, Dv) in query's dtype and, if asked, lse (B, H, Sq) in float32 (float64 for float64). A
    query that sees no key gets out 0, lse -inf and no gradient.

    Raises ValueError for arguments that do not fit, RuntimeError when a backend asked for by name cannot serve.
    """
    arguments.check_attention(
        query, key, value, importance, softcap=softcap, backend=backend, allow_other_value_dim=True
    )
    if visibility is not None:
        check_visibility(visibility, query, key, importance)
    check_query_rows(query_start, query_positions, query)
    arguments.check_dropout(dropout_p, dropout_seed, query)
    if soft is not None:
        check_soft(soft, query, key, importance, visibility)
    arguments.check_count("max_visible", max_visible, 1)
    check_backend_name(backend)
    if query_positions is None and query_start is None:
        query_start = key.shape[1] - query.shape[1]
    call = AttentionCall.prepare(
        query,
        key,
        value,
        importance if add_importance_bias else None,
        visibility,
        query_start=query_start,
        query_positions=query_positions,
        soft=soft,
        max_visible=max_visible,
        softmax_scale=softmax_scale,
        softcap=softcap,
        dropout_p=dropout_p,
        dropout_seed=dropout_seed,
        deterministic=deterministic,
    )
    out, lse = attend(call, backend)
    return (out, lse) if return_lse else out


@accept_aliases(window_size="keep_window_size")
def dynamic_mask_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    importance: torch.Tensor,
    *,
    keep_window_size: int,
    num_sink_tokens: int = 0,
    local_window_size: int = 0,
    sliding_window: int | None = None,
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    is_causal: bool = True,
    add_importance_bias: bool = True,
    padding_mask: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    max_seqlen: int | None = None,
    blocks: Blocks | None = None,
    selection_temperature: float | torch.Tensor | None = None,
    selection_band: float | None = 1.5,
    dropout_p: float = 0.0,
    dropout_seed: torch.Tensor | None = None,
    deterministic: bool = False,
    return_lse: bool = False,
    backend: str = "auto",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attends each query to the `keep_window_size` most important keys of its past (arXiv 2508.02124).

    Selection as in `select_visible`, attention as in `interval_attention`; their options mean the same here.

    query: (B, Sq, H, D). key: (B, Sk, Hkv, D), value: (B, Sk, Hkv, Dv). Queries are the last Sq of the Sk positions.
    importance: (B, Hi, Sk) floating point, Hi = Hkv, H, or 1 for all heads alike.
    padding_mask: (B, Sk) bool, True for real tokens. Padding is visible to nobody, takes no place in any window,
        and its query rows give out 0, lse -inf and no gradient, whatever stands in them.
    cu_seqlens: (num_docs + 1,) int32, document boundaries of a packed batch: B = 1, Sq = Sk.
    max_seqlen: the longest document; accepted because callers have it, no backend needs it.
    blocks: runs of tokens that see each other, as `find_blocks` returns them for the same padding and documents. A
        query then sees up to blocks.size - 1 keys more than keep_window_size, the later ones of its own block.
    selection_temperature: above 0, for training: the cut of the selection is a gate with a slope, so that a key near it
        has a gradient (`flash_dmattn.soft_selection` has the equation). In standard deviations of the importance over
        the sequence or document; a tensor () is not checked and gets no gradient. As it falls the gate becomes the hard
        mask, which None is.
    selection_band: with a temperature, at least 1: how many contested keys a query sees, in multiples of K; None: all.

    Returns out (B, Sq, H, Dv) and, if `return_lse`, lse (B, H, Sq).

    Raises ValueError for arguments that do not fit, RuntimeError when a backend asked for by name cannot serve.
    """
    if importance is None:
        raise ValueError("importance must be a tensor, got None")
    windows = keep_window_size, num_sink_tokens, local_window_size, sliding_window, is_causal
    signature = None
    if (
        (padding_mask is cu_seqlens is blocks is selection_temperature is dropout_seed is None)
        and dropout_p == 0
        and isinstance(query, torch.Tensor)
        and query.device.type in planned.DEVICES
    ):
        options = (*windows, softmax_scale, softcap, add_importance_bias, max_seqlen, deterministic, backend)
        signature = planned.signature_of(query, key, value, importance, options)
    if signature is not None:
        route = planned.find_route(signature, query, key, value)
        if route is not None:
            out, lse = route.attend(query, key, value, importance, return_lse)
            return (out, lse) if return_lse else out
    arguments.check_attention(
        query, key, value, importance, softcap=softcap, backend=backend, allow_other_value_dim=True
    )
    arguments.check_count("max_seqlen", max_seqlen, 0)
    arguments.check_dropout(dropout_p, dropout_seed, query)
    check_backend_name(backend)
    seqlen_q, seqlen_k = query.shape[1], key.shape[1]
    if cu_seqlens is not None and seqlen_q != seqlen_k:
        raise ValueError(f"query must have key's {seqlen_k} rows when cu_seqlens is given, got {seqlen_q}")
    selection = {
        "keep_window_size": keep_window_size,
        "num_sink_tokens": num_sink_tokens,
        "local_window_size": local_window_size,
        "sliding_window": sliding_window,
        "is_causal": is_causal,
        "padding_mask": padding_mask,
        "cu_seqlens": cu_seqlens,
    }
    if blocks is not None:
        selection["blocks"] = blocks
    arguments.check_soft_selection(selection_temperature, selection_band, is_causal)
    shown, soft, kept = keep_window_size, None, None
    if selection_temperature is not None and seqlen_k > keep_window_size:  # else nobody is ever evicted
        kept = select_visible(importance, **{**selection, "sliding_window": None})
        sizes = windows[:3]
        soft = cut_softly(
            importance, kept.death, selection_temperature, seqlen_q, *sizes, padding_mask, cu_seqlens, backend
        )
        shown = NEVER if selection_band is None else min(num_visible(*sizes, selection_band), NEVER)
    is_plain = is_causal and sliding_window is None and padding_mask is None and cu_seqlens is None and blocks is None
    if is_plain and _fits(seqlen_k, shown):
        arguments.check_selection(importance, **selection)
        visibility = None  # every key stays visible
    elif kept is not None and shown == keep_window_size and sliding_window is None:
        visibility = kept
    else:
        visibility = select_visible(importance, **{**selection, "keep_window_size": shown})
    num_later = 0 if blocks is None else blocks.size - 1  # keys of a row's own block that come after it
    query_positions = None
    if padding_mask is not None:
        rows = torch.arange(seqlen_k - seqlen_q, seqlen_k, dtype=torch.int32, device=query.device)
        query_positions = torch.where(padding_mask[:, seqlen_k - seqlen_q :], rows, -1)
    call = AttentionCall.prepare(
        query,
        key,
        value,
        importance if add_importance_bias else None,
        visibility,
        query_start=seqlen_k - seqlen_q,
        query_positions=query_positions,
        soft=soft,
        # Not causal, a packed document shows its w keys at once: rows can see the end of one and all of the next.
        max_visible=min(shown + num_later if is_causal else 2 * shown, NEVER),
        softmax_scale=softmax_scale,
        softcap=softcap,
        dropout_p=dropout_p,
        dropout_seed=dropout_seed,
        deterministic=deterministic,
    )
    route = None
    if signature is not None:
        route = planned.plan_route(signature, call, importance, (*clamp_windows(*windows[:4]), is_causal), backend)
    if route is not None:  # also the first time: what is saved for the backward must not depend on that
        out, lse = route.attend(query, key, value, importance, return_lse)
    else:
        out, lse = attend(call, backend)
    return (out, lse) if return_lse else out


def _fits(num_keys: int, num_shown: int) -> bool:
    """Whether all keys are shown; while exporting only if that is so at every length."""
    if not torch.compiler.is_exporting():
        return num_keys <= num_shown
    from torch.fx.experimental.symbolic_shapes import statically_known_true  # imports sympy, which takes a second

    return statically_known_true(num_keys <= num_shown)


def attend(call: AttentionCall, backend: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Runs a call on the backend of that name, differentiably. Returns out (B, Sq, H, Dv) and lse (B, H, Sq)."""
    value_dim = call.value.shape[3]
    call = call.with_one_head_dim()
    if differentiates_itself(backend):
        out, lse = choose(ATTENTION, call, backend).attend(call)
    else:
        out, lse = run_attention(call, backend)
    return (out if out.shape[3] == value_dim else out[..., :value_dim]), lse
