"""Reads the arguments of wrapped functions of transformers, whose names and order differ between its versions."""

import inspect
from collections.abc import Callable, Iterable, Mapping, MutableMapping
from typing import Any

from transformers.cache_utils import Cache


def parameter_names(function: Callable) -> tuple[str, ...]:
    """Returns the names of a function's parameters in order; decorators that say what they wrap are looked through."""
    return tuple(inspect.signature(function).parameters)


def by_name(names: Iterable[str], args: tuple, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the arguments of one call by name; names: the parameters of the function from the first of `args` on."""
    return {**dict(zip(names, args)), **kwargs}  # noqa: B905 - a call may leave parameters out


def name_of_cache(values: Mapping[str, Any]) -> str | None:
    """Returns under which name a cache is among the values, None if none is.

    The type decides: the name is `past_key_values` up to transformers 5.23, and `cache` from 5.24 on.
    """
    return next((name for name, value in values.items() if isinstance(value, Cache)), None)


def get_cache(values: Mapping[str, Any]) -> Cache | None:
    """Returns the cache among named values, such as a model's output, None if there is none."""
    name = name_of_cache(values)
    return None if name is None else values[name]


def pop_cache(values: MutableMapping[str, Any]) -> Cache | None:
    """Takes the cache out of named values and returns it, None if there is none."""
    name = name_of_cache(values)
    return None if name is None else values.pop(name)
