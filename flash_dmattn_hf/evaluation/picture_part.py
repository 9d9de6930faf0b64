"""What a picture is put together from."""

from collections.abc import Callable
from typing import Any, NamedTuple


class Part(NamedTuple):
    """A part of a picture. height: inches. draw: takes the figure or subfigure of matplotlib to fill."""

    height: float
    draw: Callable[[Any], None]
