"""The documented place of what a cache needs to give up keys; the code is in eviction.py."""

from flash_dmattn.eviction import cache_capacity, find_victim, select_survivors

__all__ = ["cache_capacity", "find_victim", "select_survivors"]
