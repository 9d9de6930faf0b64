"""What every kernel of the backend is launched with: the call, its key lists, strides, constants and block shapes."""

from dataclasses import dataclass
from functools import cached_property

import torch
import triton

from flash_dmattn.backends.triton.lists import KeyLists, build_key_lists
from flash_dmattn.call import AttentionCall


@dataclass(frozen=True)
class BlockConfig:
    """Block shape and schedule of one kernel: BLOCK_M query rows, BLOCK_N keys."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


def forward_config(head_dim: int, dtype: torch.dtype) -> BlockConfig:
    if dtype == torch.float32:
        return BlockConfig(64, 32, 4, 2)
    if head_dim <= 64:
        return BlockConfig(128, 128, 4, 3)
    if head_dim <= 128:
        return BlockConfig(128, 64, 8, 3)
    return BlockConfig(128, 64, 8, 2)


def backward_config(head_dim: int, dtype: torch.dtype) -> BlockConfig:
    if dtype == torch.float32:
        return BlockConfig(32, 32, 4, 1)
    if head_dim <= 128:
        return BlockConfig(64, 128, 8, 1)
    return BlockConfig(64, 64, 8, 1)


class Launch:
    """One call with everything the kernels need, computed when first asked for."""

    def __init__(self, call: AttentionCall, forward: BlockConfig | None = None, backward: BlockConfig | None = None):
        head_dim = call.query.shape[-1]
        self.call = call
        self.group_size = call.query.shape[2] // call.num_interval_heads
        self.forward_config = forward or forward_config(head_dim, call.query.dtype)
        self.backward_config = backward or backward_config(head_dim, call.query.dtype)

    @cached_property
    def tile_size(self) -> int:
        """Query tokens of a tile: its rows are tokens x group heads."""
        return max(1, self.forward_config.block_m // self.group_size)

    @cached_property
    def lists(self) -> KeyLists:
        return build_key_lists(self.call, self.tile_size)

    def shared_arguments(self) -> tuple:
        call, lists = self.call, self.lists
        empty = call.birth
        return (
            call.query,
            call.key,
            call.value,
            empty if call.importance is None else call.importance,
            call.birth,
            call.death,
            empty if call.query_start is None else call.query_start,
            empty if call.query_positions is None else call.query_positions,
            lists.entries,
            lists.sections,
            lists.stretches,
            call.softmax_scale,
            call.softcap,
            *call.query.stride()[:3],
            *call.key.stride()[:3],
            *call.value.stride()[:3],
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
            "HAS_START": call.query_start is not None,
            "HAS_POSITIONS": call.query_positions is not None,
            "PRECISION": "ieee" if call.query.dtype == torch.float32 else "tf32",
        }
