"""Argument checks of the public functions: ValueErrors that name the argument, what came and what is needed."""

import math

import torch

from flash_dmattn.visibility import SoftCut, Visibility


def check_selection(
    importance: torch.Tensor,
    *,
    keep_window_size: int,
    num_sink_tokens: int,
    local_window_size: int,
    sliding_window: int | None,
    is_causal: bool,
    padding_mask: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    positions: torch.Tensor | None = None,
) -> None:
    """Raises ValueError unless the arguments of `select_visible` fit each other."""
    _check_tensor("importance", importance)
    if importance.dim() != 3:
        raise ValueError(f"importance must have shape (B, Hi, Sk), got {tuple(importance.shape)}")
    if not importance.is_floating_point():
        raise ValueError(f"importance must be floating point, got {importance.dtype}")
    check_windows(keep_window_size, num_sink_tokens, local_window_size, sliding_window)
    if not is_causal and local_window_size > 0:
        raise ValueError(f"local_window_size must be 0 when is_causal=False, got {local_window_size}")
    if not is_causal and sliding_window is not None:
        raise ValueError(f"sliding_window must be None when is_causal=False, got {sliding_window}")
    batch, _, seqlen_k = importance.shape
    if padding_mask is not None:
        _check_like("padding_mask", padding_mask, (batch, seqlen_k), importance.device)
        if padding_mask.dtype != torch.bool:
            raise ValueError(f"padding_mask must be bool (True = real token), got {padding_mask.dtype}")
    if positions is not None:
        _check_like("positions", positions, tuple(importance.shape), importance.device)
        if positions.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"positions must be int32, got {positions.dtype}")
        if cu_seqlens is not None:
            raise ValueError("positions and cu_seqlens must not be given together: got both")
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, batch, importance.device)


def check_windows(
    keep_window_size: int, num_sink_tokens: int, local_window_size: int, sliding_window: int | None = None
) -> None:
    """Raises ValueError unless w >= 1, s >= 0, r >= 0, s + r <= w and the sliding window is None or >= 1."""
    sizes = {
        "keep_window_size": (keep_window_size, 1),
        "num_sink_tokens": (num_sink_tokens, 0),
        "local_window_size": (local_window_size, 0),
    }
    if sliding_window is not None:
        sizes["sliding_window"] = (sliding_window, 1)
    for name, (size, smallest) in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int | torch.SymInt):
            raise ValueError(f"{name} must be an integer, got {size!r}")
        if size < smallest:
            raise ValueError(f"{name} must be at least {smallest}, got {size}")
    if num_sink_tokens + local_window_size > keep_window_size:
        raise ValueError(
            "num_sink_tokens + local_window_size must not exceed keep_window_size, "
            f"got {num_sink_tokens} + {local_window_size} > {keep_window_size}"
        )


def check_cu_seqlens(cu_seqlens: torch.Tensor, batch: int, device: torch.device, name: str = "cu_seqlens") -> None:
    """Raises ValueError unless cu_seqlens is an integer vector on `device` and the batch is packed."""
    _check_tensor(name, cu_seqlens)
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2:
        raise ValueError(f"{name} must have shape (num_docs + 1,), got {tuple(cu_seqlens.shape)}")
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{name} must be int32, got {cu_seqlens.dtype}")
    if cu_seqlens.device != device:
        raise ValueError(f"{name} must be on device {device}, got {cu_seqlens.device}")
    if batch != 1:
        raise ValueError(f"{name} needs a packed batch of 1, got a batch of {batch}")


def check_cu_seqlens_values(cu_seqlens: torch.Tensor, num_rows: int, name: str = "cu_seqlens") -> None:
    """Raises ValueError unless cu_seqlens rises from 0 to num_rows. Values on a GPU are not looked at."""
    if cu_seqlens.device.type != "cpu":
        return
    values = cu_seqlens.tolist()
    if values[0] != 0 or values[-1] != num_rows:
        raise ValueError(f"{name} must start with 0 and end with {num_rows}, got {values[0]} and {values[-1]}")
    if any(after < before for before, after in zip(values, values[1:], strict=False)):
        raise ValueError(f"{name} must not decrease, got {values}")


def check_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    importance: torch.Tensor | None,
    *,
    softcap: float,
    backend: str,
    allow_longer_query: bool = False,
) -> None:
    """Raises ValueError unless query, key, value and importance fit each other."""
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        _check_tensor(name, tensor)
        if tensor.dim() != 4:
            raise ValueError(f"{name} must have shape (B, S, heads, D), got {tuple(tensor.shape)}")
        if tensor.dtype != query.dtype:
            raise ValueError(f"{name} must have query's dtype {query.dtype}, got {tensor.dtype}")
        if tensor.device != query.device:
            raise ValueError(f"{name} must be on query's device {query.device}, got {tensor.device}")
    if query.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        raise ValueError(f"query must be float16, bfloat16, float32 or float64, got {query.dtype}")
    batch, seqlen_q, num_heads, head_dim = query.shape
    if key.shape[0] != batch or key.shape[3] != head_dim:
        raise ValueError(f"key must have shape ({batch}, Sk, Hkv, {head_dim}), got {tuple(key.shape)}")
    if value.shape != key.shape:
        raise ValueError(f"value must have key's shape {tuple(key.shape)}, got {tuple(value.shape)}")
    seqlen_k, num_kv_heads = key.shape[1], key.shape[2]
    if head_dim == 0 or num_heads == 0 or num_kv_heads == 0:
        raise ValueError(
            f"query and key must have heads and a head dim above 0, got {tuple(query.shape)}, {tuple(key.shape)}"
        )
    if num_heads % num_kv_heads != 0:
        raise ValueError(f"query must have a multiple of key's heads, got {num_heads} heads against {num_kv_heads}")
    if seqlen_q > seqlen_k and not allow_longer_query:
        raise ValueError(f"query must not be longer than key, got {seqlen_q} rows against {seqlen_k}")
    if importance is not None:
        _check_tensor("importance", importance)
        shapes = [(batch, num_kv_heads, seqlen_k), (batch, num_heads, seqlen_k)]
        if tuple(importance.shape) not in shapes:
            wanted = " or ".join(str(shape) for shape in dict.fromkeys(shapes))
            raise ValueError(f"importance must have shape {wanted}, got {tuple(importance.shape)}")
        if not importance.is_floating_point():
            raise ValueError(f"importance must be floating point, got {importance.dtype}")
        if importance.device != query.device:
            raise ValueError(f"importance must be on query's device {query.device}, got {importance.device}")
    check_softcap(softcap)
    if not isinstance(backend, str):
        raise ValueError(f"backend must be a name, got {backend!r}")


def check_softcap(softcap: float) -> None:
    """Raises ValueError unless softcap is 0 or a positive number."""
    if not 0 <= softcap < float("inf"):
        raise ValueError(f"softcap must be 0 (off) or positive and finite, got {softcap}")


def check_count(name: str, number: int | None, smallest: int) -> None:
    """Raises ValueError unless `number` is None or an integer from `smallest` on."""
    if number is None:
        return
    if isinstance(number, bool) or not isinstance(number, int | torch.SymInt) or number < smallest:
        raise ValueError(f"{name} must be None or an integer of at least {smallest}, got {number!r}")


def check_visibility(
    visibility: Visibility,
    query: torch.Tensor,
    key: torch.Tensor,
    importance: torch.Tensor | None,
) -> None:
    """Raises ValueError unless birth and death are int32 (B, Hi, Sk) for key's heads or query's heads."""
    batch, seqlen_k, num_kv_heads, _ = key.shape
    heads = (num_kv_heads, query.shape[2]) if importance is None else (importance.shape[1],)
    shapes = [(batch, count, seqlen_k) for count in dict.fromkeys(heads)]
    for name, tensor in zip(("visibility.birth", "visibility.death"), visibility, strict=True):
        _check_tensor(name, tensor)
        if tuple(tensor.shape) not in shapes or tensor.shape != visibility[0].shape:
            wanted = " or ".join(str(shape) for shape in shapes)
            raise ValueError(f"{name} must have shape {wanted}, got {tuple(tensor.shape)}")
        if tensor.dtype != torch.int32:
            raise ValueError(f"{name} must be int32, got {tensor.dtype}")
        if tensor.device != query.device:
            raise ValueError(f"{name} must be on query's device {query.device}, got {tensor.device}")


def check_soft_selection(temperature: float | torch.Tensor | None, band: float | None, is_causal: bool) -> None:
    """Raises ValueError unless a selection can be softened like this; None as temperature is always fine."""
    if temperature is None:
        return
    if isinstance(temperature, torch.Tensor):
        if temperature.dim() != 0:
            shape = tuple(temperature.shape)
            raise ValueError(f"selection_temperature must be a number, got a tensor of shape {shape}")
    elif not 0 < temperature < math.inf:
        raise ValueError(f"selection_temperature must be None or above 0, got {temperature}")
    if band is not None and not 1 <= band < math.inf:
        raise ValueError(f"selection_band must be None or at least 1, got {band}")
    if not is_causal:
        raise ValueError("selection_temperature needs is_causal=True")


def check_soft(
    soft: SoftCut,
    query: torch.Tensor,
    key: torch.Tensor,
    importance: torch.Tensor | None,
    visibility: Visibility | None,
) -> None:
    """Raises ValueError unless a soft cut has the heads of importance and visibility, query's and key's rows."""
    given = importance if visibility is None else visibility.birth
    heads = (key.shape[2], query.shape[2]) if given is None else (given.shape[1],)
    _check_tensor("soft.score", soft.score)
    shapes = [(key.shape[0], count, key.shape[1]) for count in dict.fromkeys(heads)]
    if tuple(soft.score.shape) not in shapes:
        wanted = " or ".join(map(str, shapes))
        raise ValueError(f"soft.score must have shape {wanted}, got {tuple(soft.score.shape)}")
    rows = (*soft.score.shape[:2], query.shape[1])
    _check_like("soft.threshold", soft.threshold, rows, query.device)
    _check_like("soft.contested_from", soft.contested_from, tuple(soft.score.shape), query.device)
    for name in ("score", "threshold"):
        if not getattr(soft, name).is_floating_point():
            raise ValueError(f"soft.{name} must be floating point, got {getattr(soft, name).dtype}")
    if soft.score.device != query.device:
        raise ValueError(f"soft.score must be on query's device {query.device}, got {soft.score.device}")
    if soft.contested_from.dtype != torch.int32:
        raise ValueError(f"soft.contested_from must be int32, got {soft.contested_from.dtype}")


def check_query_rows(
    query_start: int | torch.Tensor | None, query_positions: torch.Tensor | None, query: torch.Tensor
) -> None:
    """Raises ValueError unless at most one of query_start and query_positions is given, with the right shape."""
    batch, seqlen_q = query.shape[:2]
    if query_start is not None and query_positions is not None:
        raise ValueError("query_start and query_positions must not be given together: got both")
    if query_positions is not None:
        _check_like("query_positions", query_positions, (batch, seqlen_q), query.device)
        if query_positions.dtype != torch.int32:
            raise ValueError(f"query_positions must be int32, got {query_positions.dtype}")
    if query_start is not None and not isinstance(query_start, torch.Tensor):
        if isinstance(query_start, bool) or not isinstance(query_start, int | torch.SymInt):
            raise ValueError(f"query_start must be an int or int32, got {query_start!r}")
        if not -(2**31) <= query_start < 2**31:
            raise ValueError(f"query_start must be an int of 32 bits, got {query_start}")
    if isinstance(query_start, torch.Tensor):
        _check_like("query_start", query_start, (batch,), query.device)
        if query_start.dtype != torch.int32:
            raise ValueError(f"query_start must be an int or int32, got {query_start.dtype}")


def _check_tensor(name: str, tensor: torch.Tensor) -> None:
    if not isinstance(tensor, torch.Tensor):
        raise ValueError(f"{name} must be a tensor, got {type(tensor).__name__}")


def _check_like(name: str, tensor: torch.Tensor, shape: tuple[int, ...], device: torch.device) -> None:
    _check_tensor(name, tensor)
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(tensor.shape)}")
    if tensor.device != device:
        raise ValueError(f"{name} must be on device {device}, got {tensor.device}")
