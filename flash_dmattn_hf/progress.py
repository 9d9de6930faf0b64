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
    if not label or not sys.stderr.isatty() or os.environ.get("TQDM_DISABLE"):
        return items
    return tqdm(items, desc=label if isinstance(label, str) else None, unit=unit, file=sys.stderr, leave=False)
