"""The constant-size, lossless key/value cache. Builds on the gates; the rooms above it build on this one."""

from flash_dmattn_hf.cache.cache import DynamicMaskCache
from flash_dmattn_hf.cache.snapshot import CacheSnapshot

__all__ = ["CacheSnapshot", "DynamicMaskCache"]
