"""Block shapes and schedules of the kernels for masks and biases, by head dim, dtype and shared memory of the GPU."""

import torch

from flash_dmattn.backends.triton import configs
from flash_dmattn.backends.triton.configs import BlockConfig


def grains(query: torch.Tensor) -> tuple[int, int]:
    """Returns rows and keys of a tile as it is classified; every block shape here is a multiple of it."""
    row, large = configs._bytes_per_row(query), configs._is_large(query.device)
    if query.dtype == torch.float32:
        return (32 if large and row <= 512 else 16), 16
    return (64 if large or row <= 256 else 32), 32


def forward_config(query: torch.Tensor) -> BlockConfig:
    row, large = configs._bytes_per_row(query), configs._is_large(query.device)
    if query.dtype == torch.float32:
        return BlockConfig(32, 32, 4, 1) if large and row <= 512 else BlockConfig(32, 16, 4, 1)
    if row <= 64:
        return BlockConfig(128, 32, 4, 3)  # Triton 3.6's ptxas crashes over wider blocks
    if row <= 128:
        return BlockConfig(128, 64, 4, 3)
    if row <= 256:
        return BlockConfig(128, 64, 8, 3) if large else BlockConfig(64, 32, 4, 2)
    return BlockConfig(128, 32, 8, 2) if large else BlockConfig(64, 32, 4, 1)


def dquery_config(query: torch.Tensor) -> BlockConfig:
    row, large = configs._bytes_per_row(query), configs._is_large(query.device)
    if query.dtype == torch.float32:
        return BlockConfig(32, 32, 4, 1) if large and row <= 512 else BlockConfig(32, 16, 4, 1)
    if row <= 256 and large:
        return BlockConfig(128, 64, 4 if row <= 128 else 8, 2)
    if row <= 256:
        return BlockConfig(64, 32, 4, 1)
    return BlockConfig(64, 64, 8, 1) if large else BlockConfig(64, 32, 8, 1)


def dkey_config(query: torch.Tensor) -> BlockConfig:
    row, large = configs._bytes_per_row(query), configs._is_large(query.device)
    if query.dtype == torch.float32:
        return BlockConfig(32, 32, 4, 1) if large and row <= 512 else BlockConfig(16, 16, 4, 1)
    if row <= 256:
        return BlockConfig(64, 128, 8, 1) if large else BlockConfig(64, 64, 8, 1)
    return BlockConfig(64, 64, 8, 1) if large else BlockConfig(32, 32, 4, 1)
