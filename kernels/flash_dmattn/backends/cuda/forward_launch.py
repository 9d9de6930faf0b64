"""The forward in CUDA: one launch of the package's own library over the key lists of a call."""

import torch

from flash_dmattn.backends.cuda.library import launch, load
from flash_dmattn.backends.cuda.parameters import ForwardParameters, addresses, call_fields
from flash_dmattn.backends.cuda.target import find_target
from flash_dmattn.backends.key_lists import KeyLists, scale_importance
from flash_dmattn.calls import AttentionCall


def tile_rows(call: AttentionCall) -> int:
    """Returns the rows of a query tile, tokens x group heads, or 0 when the library has no kernel for the call."""
    target = find_target(call.query.device)
    is_bfloat16 = call.query.dtype == torch.bfloat16
    return load().flash_dmattn_forward_tile_rows(call.query.shape[-1], is_bfloat16, target.is_for_sm90a)


def tile_size(call: AttentionCall) -> int:
    """Returns the query tokens of a tile."""
    return tile_rows(call) // (call.query.shape[2] // call.num_interval_heads)


def run_forward(call: AttentionCall, lists: KeyLists | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns out, lse and stats, as the operator does.

    lists: those of the call for tiles of `tile_size(call)`; None where every key is visible from its own row on.
    """
    batch, seqlen_q, num_heads, _ = call.query.shape
    out = torch.empty_like(call.query, memory_format=torch.contiguous_format)
    lse = torch.empty(batch, num_heads, seqlen_q, dtype=torch.float32, device=out.device)
    stats = torch.empty(2, *lse.shape, dtype=torch.float32, device=out.device)
    target = find_target(out.device)
    # The sm90 kernels know the start and scale the importance themselves where there are no lists.
    is_plain = lists is None and target.is_for_sm90a
    query_start = call.first_rows() if call.is_ordered and not is_plain else call.query_start
    if lists is None:
        biases = call.importance
        if not is_plain and biases is not None:
            biases = scale_importance(biases)
        # The only epoch is as long as the sequence, so that no tile of it is empty.
        lists = KeyLists(None, biases, None, None, 0, 1, call.key.shape[1], seqlen_q, tile_size(call))
    parameters = ForwardParameters(
        **call_fields(call, lists, query_start),
        **addresses(out=out, lse=lse, stats=stats),
        is_for_sm90a=target.is_for_sm90a,
        shared_bytes=target.shared_bytes,
    )
    launch("flash_dmattn_forward", parameters, out.device)
    return out, lse, stats
