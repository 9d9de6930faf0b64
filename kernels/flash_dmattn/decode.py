"""The documented name of `flash_dmattn.eviction`."""

from flash_dmattn.eviction import cache_capacity, find_victim, select_survivors

__all__ = ["cache_capacity", "find_victim", "select_survivors"]
