"""The documented place of `chunked_cross_entropy`; the code is in training/chunked_cross_entropy.py."""

from flash_dmattn_hf.training.chunked_cross_entropy import chunked_cross_entropy

__all__ = ["chunked_cross_entropy"]
