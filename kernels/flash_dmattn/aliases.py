"""Second names of arguments, for code that was written against other versions."""

import functools
import inspect
from collections.abc import Callable


def accept_aliases(**aliases: str) -> Callable:
    """Returns a decorator: a function then takes each argument also by its alias, `alias="argument"`.

    Giving both is a TypeError, as giving an argument twice is.
    """

    def decorate(function: Callable) -> Callable:
        place = {name: index for index, name in enumerate(inspect.signature(function).parameters)}

        @functools.wraps(function)
        def with_aliases(*args, **kwargs):
            for alias, name in aliases.items():
                if alias in kwargs:
                    if name in kwargs or place[name] < len(args):
                        raise TypeError(f"{function.__name__}() got both {name!r} and its alias {alias!r}")
                    kwargs[name] = kwargs.pop(alias)
            return function(*args, **kwargs)

        return with_aliases

    return decorate
