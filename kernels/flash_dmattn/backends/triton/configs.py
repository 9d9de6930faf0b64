"""Block shapes and schedules of the kernels, by head dim, dtype and the shared memory of the GPU.

Huge: the H100's and B200's shared memory (227 KB); large: the A100's as well (164 KB); small: that of consumer GPUs
(100 KB). The choices for an H100 were measured, docs/kernels.md; the others only have to fit.
"""

import functools
from dataclasses import dataclass

import torch
import triton

_HUGE, _LARGE = 220 * 1024, 160 * 1024  # bytes of shared memory that a program can have

_DECODE_PROGRAMS, _MAX_SPLIT = 256, 1024
"""Programs that keep a GPU busy while decoding, and the most slots of one."""


@dataclass(frozen=True)
class BlockConfig:
    """Block shape and schedule of one kernel: BLOCK_M query rows, BLOCK_N keys.

    max_registers: of a thread, few enough for another program on the same processor; None: as many as it takes.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    max_registers: int | None = None

    def launch_options(self) -> dict:
        """Returns what Triton's launch is told of the schedule."""
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        return options if self.max_registers is None else {**options, "maxnreg": self.max_registers}


@dataclass(frozen=True)
class DecodeConfig:
    """A program of the decoding kernel serves split_size slots, BLOCK_N at a time."""

    split_size: int
    block_n: int
    num_warps: int
    num_stages: int


def forward_config(query: torch.Tensor, weighs_pairs: bool = False) -> BlockConfig:
    """Returns that of the forward which gathers keys. BLOCK_M holds any group of heads.

    weighs_pairs: with a soft cut or dropout, whose numbers need as many registers again.
    """
    row, is_large = _bytes_per_row(query), _is_large(query.device)
    if query.dtype == torch.float32:
        return BlockConfig(64, 32, 4, 2) if row <= 512 and is_large else BlockConfig(32, 16, 4, 1)
    if weighs_pairs and row <= 256:
        return BlockConfig(128, 64 if row <= 128 else 32, 8, 3)
    if row <= 64:
        return BlockConfig(128, 32, 4, 3)  # Triton 3.6's ptxas crashes over wider blocks
    if row <= 128:
        return BlockConfig(128, 64, 4, 3)
    if row <= 256:
        return BlockConfig(256, 32, 8, 5) if is_large else BlockConfig(128, 32, 4, 3)
    return BlockConfig(128, 32, 8, 3) if is_large else BlockConfig(64, 32, 4, 1)


def causal_config(query: torch.Tensor) -> BlockConfig:
    """Returns that of the forward which reads keys in order. BLOCK_M holds any group of heads."""
    row, is_large, is_huge = _bytes_per_row(query), _is_large(query.device), _shared_bytes(query.device) >= _HUGE
    if query.dtype == torch.float32:
        return BlockConfig(64, 32, 4, 2) if row <= 512 and is_large else BlockConfig(32, 16, 4, 1)
    if row <= 64:
        return BlockConfig(128, 32, 4, 3)  # Triton 3.6's ptxas crashes over wider blocks
    if row <= 128:
        return BlockConfig(128, 64, 8, 3)
    if row <= 256 and is_huge:
        return BlockConfig(128, 64, 8, 2, max_registers=128)  # two programs on a processor take turns
    if row <= 256:
        return BlockConfig(128, 64, 8, 3) if is_large else BlockConfig(128, 32, 4, 3)
    if is_huge:
        return BlockConfig(128, 64, 8, 2)
    return BlockConfig(128, 32, 8, 3) if is_large else BlockConfig(64, 32, 4, 1)


def dquery_config(query: torch.Tensor, weighs_pairs: bool = False) -> BlockConfig:
    """BLOCK_M holds any group of heads. weighs_pairs: as for the forward."""
    row, is_large = _bytes_per_row(query), _is_large(query.device)
    if query.dtype == torch.float32:
        return BlockConfig(32, 32, 4, 1) if row <= 512 and is_large else BlockConfig(32, 16, 4, 1)
    if weighs_pairs and row <= 256:
        return BlockConfig(128, 32, 8, 3) if is_large else BlockConfig(64, 32, 8, 1)
    if row <= 256 and is_large:
        return BlockConfig(128, 64, 4 if row <= 128 else 8, 3)
    if row <= 256:
        return BlockConfig(64, 32, 4, 1)
    return BlockConfig(64, 64, 8, 1) if is_large else BlockConfig(32, 32, 4, 1)


def dkey_config(query: torch.Tensor, weighs_pairs: bool = False) -> BlockConfig:
    """BLOCK_N keys of a program, which walks blocks of BLOCK_M query rows. weighs_pairs: as for the forward."""
    row, is_large = _bytes_per_row(query), _is_large(query.device)
    if query.dtype == torch.float32:
        return BlockConfig(32, 32, 4, 1) if row <= 512 and is_large else BlockConfig(16, 16, 4, 1)
    if weighs_pairs and row <= 256:
        return BlockConfig(32, 128 if row <= 128 and is_large else 64, 8, 1)
    if row <= 256:
        return BlockConfig(64, 128, 8, 1) if is_large else BlockConfig(32, 64, 4, 1)
    return BlockConfig(64, 64, 8, 1) if is_large else BlockConfig(32, 32, 4, 1)


def decode_config(num_heads: int, num_slots: int, query: torch.Tensor) -> DecodeConfig:
    """A sequence alone is spread over the whole GPU; num_heads: of the batch."""
    return _decode_config(num_heads, num_slots, query.shape[-1], query.element_size(), query.device)


@functools.cache
def _decode_config(
    num_heads: int, num_slots: int, head_dim: int, element_size: int, device: torch.device
) -> DecodeConfig:
    row = max(16, triton.next_power_of_2(head_dim)) * element_size
    block_n = max(16, min(64, 2**14 // row))
    splits = triton.cdiv(_DECODE_PROGRAMS, num_heads)
    split_size = triton.next_power_of_2(triton.cdiv(num_slots, splits))
    split_size = max(block_n, min(split_size, _MAX_SPLIT))
    if split_size == block_n:
        return DecodeConfig(split_size, block_n, 4, 1)
    if row == 128 and split_size >= 512 and _is_large(device):
        return DecodeConfig(split_size, 128, 4, 3)
    return DecodeConfig(split_size, block_n, 4, 2)


def _bytes_per_row(query: torch.Tensor) -> int:
    return max(16, triton.next_power_of_2(query.shape[-1])) * query.element_size()


def _is_large(device: torch.device) -> bool:
    return _shared_bytes(device) >= _LARGE


@functools.cache
def _shared_bytes(device: torch.device) -> int:
    if device.type != "cuda":
        return _HUGE
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin
