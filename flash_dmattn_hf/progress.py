"""Progress bars: on stderr, silent when nobody watches."""

import os
import sys
from collections.abc import Iterable
from typing import TypeVar

from tqdm import tqdm

Item = TypeVar("Item")


def progress_bar(items: Iterable[Item], label: bool | str | None, *, unit: str = "it") -> Iterable[Item]:
    """Wraps `items` in a bar that is drawn only on a terminal.

    label: text before the bar, True for a bar without text, None or False for no bar.
    """
    if not label or not _is_watched():
        return items
    return tqdm(items, desc=label if isinstance(label, str) else None, unit=unit, file=sys.stderr, leave=False)


def share_bar(label: str | None) -> tqdm:
    """Returns a bar from 0 to 100 %, drawn only on a terminal; its `n` is to be set. None for a label: no bar."""
    form = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}{postfix}"
    hidden = label is None or not _is_watched()
    return tqdm(total=100, desc=label, bar_format=form, file=sys.stderr, leave=False, disable=hidden)


def _is_watched() -> bool:
    return sys.stderr.isatty() and not os.environ.get("TQDM_DISABLE")
