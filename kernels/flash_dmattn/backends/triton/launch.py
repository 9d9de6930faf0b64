"""What every kernel of the backend is launched with: the call, its key lists, strides and constants."""

from functools import cached_property

import torch
import triton

from flash_dmattn.backends.device import strides
from flash_dmattn.backends.key_lists import KeyLists, is_listed
from flash_dmattn.backends.triton.lists import build_key_lists
from flash_dmattn.calls import AttentionCall
from flash_dmattn.dispatch import KEY_LISTS, find
from flash_dmattn.dropout import drop_limit


class Launch:
    """One call with what its kernels share. Query tiles have up to `block_m` rows, tokens x group heads."""

    def __init__(self, call: AttentionCall, block_m: int):
        self.call = call
        self.group_size = call.query.shape[2] // call.num_interval_heads
        self.tile_size = max(1, block_m // self.group_size)

    @cached_property
    def lists(self) -> KeyLists:
        backend = find(KEY_LISTS, self.call.query.device, self.call)
        build = build_key_lists if backend is None else backend.build_key_lists
        return build(self.call, self.tile_size)

    def shared_arguments(self) -> tuple:
        call, lists = self.call, self.lists
        unused = call.query
        birth, death = call.intervals() if is_listed(call) else (None, None)
        tensors = (
            birth,
            death,
            call.first_rows() if call.is_ordered else None,
            call.query_positions,
            lists.entries,
            lists.biases,
            lists.sections,
            lists.stretches,
            *((None, None, None) if call.soft is None else call.soft),
            call.dropout_seed,
        )
        return (
            call.query,
            call.key,
            call.value,
            *(unused if tensor is None else tensor for tensor in tensors),
            call.softmax_scale,
            call.softcap,
            drop_limit(call.dropout_p),
            1 / (1 - call.dropout_p),
            *strides(call),
            call.query.shape[1],
            call.key.shape[1],
            lists.num_epochs,
            lists.capacity,
            lists.tiles_per_epoch,
        )

    def constants(self) -> dict:
        call = self.call
        head_dim = call.query.shape[-1]
        return {
            "HEADS": call.num_interval_heads,
            "GROUP": self.group_size,
            "HEADS_PER_KV": call.num_interval_heads // call.key.shape[2],
            "HEAD_DIM": head_dim,
            "BLOCK_D": max(16, triton.next_power_of_2(head_dim)),
            "EPOCH": self.lists.epoch_size,
            "TILE": self.lists.tile_size,
            "HAS_BIAS": call.importance is not None,
            "HAS_SOFTCAP": call.softcap > 0,
            "HAS_START": call.is_ordered,
            "HAS_POSITIONS": call.query_positions is not None,
            "HAS_SOFT": call.soft is not None,
            "HAS_DROPOUT": call.dropout_seed is not None,
            "PRECISION": "ieee" if call.query.dtype == torch.float32 else "tf32",
        }
