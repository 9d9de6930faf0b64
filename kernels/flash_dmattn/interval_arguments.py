"""Checks of what only `interval_attention` takes: intervals, a soft cut, and the rows of the queries."""

import torch

from flash_dmattn.arguments import check_like, check_tensor
from flash_dmattn.visibility import SoftCut, Visibility


def check_visibility(
    visibility: Visibility,
    query: torch.Tensor,
    key: torch.Tensor,
    importance: torch.Tensor | None,
) -> None:
    """Raises ValueError unless birth and death are int32 (B, Hi, Sk) for key's heads, query's heads or one."""
    batch, seqlen_k, num_kv_heads, _ = key.shape
    heads = (num_kv_heads, query.shape[2], 1) if importance is None else (importance.shape[1],)
    shapes = [(batch, count, seqlen_k) for count in dict.fromkeys(heads)]
    for name, tensor in zip(("visibility.birth", "visibility.death"), visibility, strict=True):
        check_tensor(name, tensor)
        if tuple(tensor.shape) not in shapes or tensor.shape != visibility[0].shape:
            wanted = " or ".join(str(shape) for shape in shapes)
            raise ValueError(f"{name} must have shape {wanted}, got {tuple(tensor.shape)}")
        if tensor.dtype != torch.int32:
            raise ValueError(f"{name} must be int32, got {tensor.dtype}")
        if tensor.device != query.device:
            raise ValueError(f"{name} must be on query's device {query.device}, got {tensor.device}")


def check_soft(
    soft: SoftCut,
    query: torch.Tensor,
    key: torch.Tensor,
    importance: torch.Tensor | None,
    visibility: Visibility | None,
) -> None:
    """Raises ValueError unless a soft cut has the heads of importance and visibility, query's and key's rows."""
    given = importance if visibility is None else visibility.birth
    heads = (key.shape[2], query.shape[2], 1) if given is None else (given.shape[1],)
    check_tensor("soft.score", soft.score)
    shapes = [(key.shape[0], count, key.shape[1]) for count in dict.fromkeys(heads)]
    if tuple(soft.score.shape) not in shapes:
        wanted = " or ".join(map(str, shapes))
        raise ValueError(f"soft.score must have shape {wanted}, got {tuple(soft.score.shape)}")
    rows = (*soft.score.shape[:2], query.shape[1])
    check_like("soft.threshold", soft.threshold, rows, query.device)
    check_like("soft.contested_from", soft.contested_from, tuple(soft.score.shape), query.device)
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
    """Raises ValueError unless query_start and query_positions are None or have the right shape and type."""
    batch, seqlen_q = query.shape[:2]
    if query_positions is not None:
        check_like("query_positions", query_positions, (batch, seqlen_q), query.device)
        if query_positions.dtype != torch.int32:
            raise ValueError(f"query_positions must be int32, got {query_positions.dtype}")
    if query_start is not None and not isinstance(query_start, torch.Tensor):
        if isinstance(query_start, bool) or not isinstance(query_start, int | torch.SymInt):
            raise ValueError(f"query_start must be an int or int32, got {query_start!r}")
        if not -(2**31) <= query_start < 2**31:
            raise ValueError(f"query_start must be an int of 32 bits, got {query_start}")
    if isinstance(query_start, torch.Tensor):
        check_like("query_start", query_start, (batch,), query.device)
        if query_start.dtype != torch.int32:
            raise ValueError(f"query_start must be an int or int32, got {query_start.dtype}")
