"""A place for what one call passes on within one thread, so that it need not live on a module that threads share."""

import threading
from typing import Any


class _Slot:
    content: Any = None


class ThreadSlot(threading.local):
    """Has a `slot` for every thread, whose `content` is None at first.

    The content is an attribute of a plain object because torch.compile follows changes of that; it loses those of a
    thread-local's own attributes where a graph breaks.
    """

    def __init__(self) -> None:
        self.slot = _Slot()
