"""Arguments of the public functions: their second names, and checks.

The checks raise ValueErrors that name the argument, what came and what is needed.
"""

import functools
import inspect
import math
from collections.abc import Callable

import torch


def accept_aliases(**aliases: str) -> Callable:
    """Returns a decorator: a function then takes each argument also by its alias, `alias="argument"`.

    Aliases are for code that was written against other versions. Giving both an argument and its alias is a TypeError.
    """

    def decorate(function: Callable) -> Callable:
        place = {name: index for index, name in enumerate(inspect.signature(function).parameters)}

        @functools.wraps(function)
        def with_aliases(*args, **kwargs):
            for alias, name in aliases.items():
                if alias in kwargs:
                    if name in kwargs or place[name] < len(args):
                        raise TypeError(f"{function.__name__}() got both {name!r} and its alias {alias!r}")
                    kwargs[name] = kwargs.pop(alias)
            return function(*args, **kwargs)

        return with_aliases

    return decorate


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
    check_tensor("importance", importance)
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
        check_like("padding_mask", padding_mask, (batch, seqlen_k), importance.device)
        if padding_mask.dtype != torch.bool:
            raise ValueError(f"padding_mask must be bool (True = real token), got {padding_mask.dtype}")
    if positions is not None:
        check_like("positions", positions, tuple(importance.shape), importance.device)
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
    check_tensor(name, cu_seqlens)
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
    allow_other_value_dim: bool = False,
) -> None:
    """Raises ValueError unless query, key, value and importance fit each other, RuntimeError under torch.jit.trace."""
    if torch.jit.is_tracing():
        raise RuntimeError(
            "flash_dmattn cannot be recorded by torch.jit.trace, which would keep what follows from the length of its "
            "example: use torch.export.export with a dynamic length"
        )
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        check_tensor(name, tensor)
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
    if allow_other_value_dim and (value.shape[:3] != key.shape[:3] or value.shape[3] == 0):
        raise ValueError(f"value must have key's shape {tuple(key.shape)} up to its head dim, got {tuple(value.shape)}")
    if not allow_other_value_dim and value.shape != key.shape:
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
        check_tensor("importance", importance)
        shapes = [(batch, count, seqlen_k) for count in (num_kv_heads, num_heads, 1)]
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


def check_dropout(dropout_p: float, dropout_seed: torch.Tensor | None, query: torch.Tensor) -> None:
    """Raises ValueError unless 0 <= dropout_p < 1 and the seed is None or int64 (B,) on query's device."""
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p must be at least 0 and below 1, got {dropout_p}")
    if dropout_seed is not None:
        check_like("dropout_seed", dropout_seed, (query.shape[0],), query.device)
        if dropout_seed.dtype != torch.int64:
            raise ValueError(f"dropout_seed must be int64, got {dropout_seed.dtype}")


def check_tensor(name: str, tensor: torch.Tensor) -> None:
    """Raises ValueError unless an argument is a tensor."""
    if not isinstance(tensor, torch.Tensor):
        raise ValueError(f"{name} must be a tensor, got {type(tensor).__name__}")


def check_like(name: str, tensor: torch.Tensor, shape: tuple[int, ...], device: torch.device) -> None:
    """Raises ValueError unless an argument is a tensor of that shape on that device."""
    check_tensor(name, tensor)
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(tensor.shape)}")
    if tensor.device != device:
        raise ValueError(f"{name} must be on device {device}, got {tensor.device}")
