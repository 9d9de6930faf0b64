"""The sm80 backward in CUDA: one call of the package's own library over the key lists of a call.

A block takes a tile of an epoch's keys with the run of query tiles that see some of it. dkey, dvalue and dimportance
stay in registers meanwhile, dquery is added to float32 sums in memory: see csrc/sm80/backward/kernel.cuh.
"""

import torch

from flash_dmattn.backends.cuda.gradients import allocate_gradients, build_backward_lists
from flash_dmattn.backends.cuda.library import launch, load
from flash_dmattn.backends.cuda.parameters import Sm80BackwardParameters, addresses, call_fields
from flash_dmattn.backends.cuda.target import find_target
from flash_dmattn.calls import AttentionCall

_ROUNDS = 4
_KEYS_OF_PROCESSOR = 1024  # eight tiles of keys


def reject_backward(call: AttentionCall) -> str | None:
    """Returns why this backward does not serve a call that the forward serves, or None."""
    if call.deterministic:
        return "gradients are added up in no fixed order"
    if call.query.numel() == 0 or call.key.shape[1] == 0:
        return "there are no queries or no keys"
    if tile_rows(call) == 0:
        return f"no backward for head dim {call.query.shape[-1]} was built, or the GPU lacks shared memory for it"
    return None


def tile_rows(call: AttentionCall) -> int:
    """Returns the rows of a query tile, tokens x group heads, or 0 when the library has no kernel for the call."""
    shared_bytes = find_target(call.query.device).shared_bytes
    is_bfloat16 = call.query.dtype == torch.bfloat16
    return load().flash_dmattn_sm80_backward_tile_rows(call.query.shape[-1], is_bfloat16, shared_bytes)


def count_epochs(num_epochs: int, listed_keys: int, processors: int) -> int:
    """Returns how many epochs of every head have sums of dquery at a time, given the `listed_keys` of one epoch of all
    heads: a quarter of them, unless that leaves a processor too little to do between two waits."""
    enough = -(-_KEYS_OF_PROCESSOR * processors // max(listed_keys, 1))
    return min(num_epochs, max(-(-num_epochs // _ROUNDS), enough))


def run_backward(
    call: AttentionCall, out: torch.Tensor, stats: torch.Tensor, dout: torch.Tensor, dlse: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Returns dquery, dkey, dvalue in their dtypes and dimportance float32, or None without importance.

    Allocates float32 sums of the size of key and value and, for long sequences, of a quarter of query; beside the key
    lists 4 bytes per query row.
    """
    batch, seqlen_q, num_heads, head_dim = call.query.shape
    device = call.query.device
    rows = tile_rows(call)
    lists = build_backward_lists(call, rows)
    gradients = allocate_gradients(call)
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    epochs_at_once = count_epochs(lists.num_epochs, lists.num_lists * lists.capacity, processors)
    sums_shape = (lists.num_lists, epochs_at_once, lists.tiles_per_epoch, rows, head_dim)
    dquery_sums = torch.empty(sums_shape, dtype=torch.float32, device=device)
    deltas = torch.empty(batch, num_heads, seqlen_q, dtype=torch.float32, device=device)
    dout, dlse = dout.contiguous(), dlse.contiguous()
    query_start = call.first_rows() if call.is_ordered else None
    parameters = Sm80BackwardParameters(
        **call_fields(call, lists, query_start),
        **addresses(out=out, dout=dout, dlse=dlse, stats=stats, deltas=deltas),
        **addresses(dquery_sums=dquery_sums, **vars(gradients)),
        epochs_at_once=epochs_at_once,
        shared_bytes=find_target(device).shared_bytes,
    )
    launch("flash_dmattn_sm80_backward", parameters, device)
    return gradients.results()
