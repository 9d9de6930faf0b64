"""What the launches of both backwards share: the gradients they fill, and the epochs of keys that are not listed."""

from dataclasses import dataclass, replace

import torch

from flash_dmattn.backends.cuda.lists import build_key_lists
from flash_dmattn.backends.key_lists import KeyLists
from flash_dmattn.calls import AttentionCall

_UNLISTED_EPOCH_TILES = 32


@dataclass(frozen=True)
class Gradients:
    """The results of a backward, and its float32 sums.

    dquery: (B, Sq, H, D). dkey, dvalue: (B, Sk, Hkv, D). These have the dtype of their inputs and are contiguous.
    dimportance: (B, Hi, Sk) float32, zero, or None without importance.
    dkey_sums, dvalue_sums: (B, Sk, Hkv, D) float32, zero.
    """

    dquery: torch.Tensor
    dkey: torch.Tensor
    dvalue: torch.Tensor
    dimportance: torch.Tensor | None
    dkey_sums: torch.Tensor
    dvalue_sums: torch.Tensor

    def results(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
        return self.dquery, self.dkey, self.dvalue, self.dimportance


def allocate_gradients(call: AttentionCall) -> Gradients:
    """Returns gradients for a call's tensors: sums are zero, what the kernels write is not set."""

    def zeros(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=torch.float32, device=call.query.device)

    dquery, dkey, dvalue = (
        torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in (call.query, call.key, call.value)
    )
    dimportance = None if call.importance is None else zeros(*call.importance.shape)
    return Gradients(dquery, dkey, dvalue, dimportance, *zeros(2, *call.key.shape))


def build_backward_lists(call: AttentionCall, tile_rows: int) -> KeyLists:
    """Returns the key lists for query tiles of `tile_rows` rows (tokens x group heads).

    Where keys are not listed, epochs are whole tiles, few enough to give every block work.
    """
    lists = build_key_lists(call, tile_rows // (call.query.shape[2] // call.num_interval_heads))
    if lists.entries is not None:
        return lists
    seqlen_q = call.query.shape[1]
    epoch_size = min(_UNLISTED_EPOCH_TILES, -(-seqlen_q // lists.tile_size)) * lists.tile_size
    return replace(lists, epoch_size=epoch_size, num_epochs=-(-seqlen_q // epoch_size))
