"""A mask whose tiles are known already, for the layers or calls that share it."""

from dataclasses import dataclass

import torch

from flash_dmattn.calls import DenseCall
from flash_dmattn.dense.arguments import check_dense
from flash_dmattn.dispatch import DENSE_ATTENTION


@dataclass(frozen=True)
class TiledMask:
    """What `tile_mask` returns, to be given as attn_mask.

    tiles: (1 or B, 1 or Hkv or H, row tiles, key tiles) uint8: 0 for a tile in which nobody sees anything, 2 where
        everybody sees everything, 1 otherwise; None where no backend asks for them.
    version: of attn_mask when it was read, None where torch keeps none.
    """

    attn_mask: torch.Tensor
    is_causal: bool
    tiles: torch.Tensor | None
    version: int | None

    def check(self, is_causal: bool) -> None:
        """Raises ValueError unless the tiles are still those of the mask, and of such a call."""
        if is_causal != self.is_causal:
            raise ValueError(f"is_causal must be {self.is_causal}, as the mask was tiled with, got {is_causal}")
        if not torch.compiler.is_compiling() and _version(self.attn_mask) != self.version:
            raise ValueError("attn_mask must not change after tile_mask, got one that was written to: tile it again")


@torch.no_grad()
def tile_mask(query: torch.Tensor, key: torch.Tensor, attn_mask: torch.Tensor, *, is_causal: bool = False) -> TiledMask:
    """Reads a mask once for all calls that share it; each of them, and each backward, would read it again otherwise.

    query: (B, Sq, H, D). key: (B, Sk, Hkv, D). Only shapes, dtype and device count.
    attn_mask: as in `flash_dmattn_func`, which takes what is returned in its place; not to be written to any more.
    is_causal: as in the calls to come.

    Raises ValueError for arguments that do not fit.
    """
    check_dense(query, key, key, attn_mask, None, softcap=0.0, backend="auto")
    attn_mask = without_expansion(attn_mask)
    call = DenseCall(
        query=query,
        key=key,
        value=key,
        attn_mask=attn_mask,
        attn_bias=None,
        tiles=None,
        is_causal=is_causal,
        softmax_scale=1.0,
        softcap=0.0,
        deterministic=False,
    )
    tiles = None
    if DENSE_ATTENTION.why_not("triton", call) is None and not call.is_empty:
        from flash_dmattn.dense.configs import grains
        from flash_dmattn.dense.tiles import classify_tiles

        with torch.cuda.device_of(query):
            tiles = classify_tiles(call, *grains(query))
    return TiledMask(attn_mask, is_causal, tiles, _version(attn_mask))


def without_expansion(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """Returns a view with size 1 where the stride is 0."""
    if tensor is None:
        return None
    for dim, (size, stride) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)):
        if stride == 0 and size > 1:
            tensor = tensor.narrow(dim, 0, 1)
    return tensor


def _version(tensor: torch.Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version
