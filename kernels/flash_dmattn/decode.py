"""The documented place of what a cache needs to give up keys; the code is in ranking.py."""

from flash_dmattn.ranking import cache_capacity, find_victim, select_survivors

__all__ = ["cache_capacity", "find_victim", "select_survivors"]
