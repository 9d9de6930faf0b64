"""The sm80 backward in CUDA: which calls it serves, and how its work is cut.

A block takes a tile of an epoch's keys with the run of query tiles that see some of it. dkey, dvalue and dimportance
stay in registers meanwhile, dquery is added to float32 sums in memory: see csrc/sm80/backward/kernel.cuh.
"""

import torch

from flash_dmattn.backends.cuda import library
from flash_dmattn.backends.cuda.head_dims import kernel_dim
from flash_dmattn.backends.cuda.parameters import Sm80BackwardParameters
from flash_dmattn.backends.cuda.plans import PassShape
from flash_dmattn.backends.cuda.target import find_target
from flash_dmattn.calls import AttentionCall

_ROUNDS = 4
_KEYS_OF_PROCESSOR = 1024  # eight tiles of keys

Parameters = Sm80BackwardParameters


def reject_backward(call: AttentionCall) -> str | None:
    """Returns why this backward does not serve a call that the forward serves, or None."""
    if call.deterministic:
        return "gradients are added up in no fixed order"
    if call.query.numel() == 0 or call.key.shape[1] == 0:
        return "there are no queries or no keys"
    shared_bytes = find_target(call.query.device).shared_bytes
    head_dim = kernel_dim(call.query.shape[3])
    if _tile_rows(head_dim, call.query.dtype == torch.bfloat16, shared_bytes) == 0:
        return f"no backward for head dim {head_dim} was built, or the GPU lacks shared memory for it"
    return None


def tile_rows(shape: PassShape) -> int:
    """Returns the rows of a query tile, tokens x group heads."""
    return _tile_rows(shape.head_dim, shape.is_bfloat16, shape.target.shared_bytes)


def count_epochs(num_epochs: int, listed_keys: int, processors: int) -> int:
    """Returns how many epochs of every head have sums of dquery at a time, given the `listed_keys` of one epoch of all
    heads: a quarter of them, unless that leaves a processor too little to do between two waits."""
    enough = -(-_KEYS_OF_PROCESSOR * processors // max(listed_keys, 1))
    return min(num_epochs, max(-(-num_epochs // _ROUNDS), enough))


def own_fields(shape: PassShape, tiles: dict[str, int]) -> dict[str, int]:
    """Returns the fields of `Sm80BackwardParameters` that are no addresses and that no other kernel has.

    Sums of dquery are float32, for long sequences of a quarter of query.
    """
    processors = torch.cuda.get_device_properties(shape.device).multi_processor_count
    listed_keys = shape.num_lists * tiles["capacity"]
    return {
        "epochs_at_once": count_epochs(tiles["num_epochs"], listed_keys, processors),
        "shared_bytes": shape.target.shared_bytes,
    }


def _tile_rows(head_dim: int, is_bfloat16: bool, shared_bytes: int) -> int:
    """Returns 0 when the library has no kernel for these."""
    return library.load().flash_dmattn_sm80_backward_tile_rows(head_dim, is_bfloat16, shared_bytes)
