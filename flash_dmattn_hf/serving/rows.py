"""Who holds which row of slots: requests, the children they will fork into, and snapshots of prefixes."""

from collections import OrderedDict
from collections.abc import Hashable


class Rows:
    """The rows of `num_rows` requests. A request keeps its rows until it ends; a snapshot gives its row to a request.

    held: request id -> its row, then one for each child that it will fork into.
    snapshots: name of a prefix -> its row, the one that was used longest ago first.
    """

    def __init__(self, num_rows: int):
        self.num_rows = num_rows
        self._free = list(reversed(range(num_rows)))
        self.held: dict[str, list[int]] = {}
        self.snapshots: OrderedDict[Hashable, int] = OrderedDict()

    @property
    def num_available(self) -> int:
        """Rows that a request can have now."""
        return len(self._free) + len(self.snapshots)

    def admit(self, request_id: str, count: int) -> bool:
        """Gives a request all rows that it will ever need, or none and returns False."""
        if self.num_available < count:
            return False
        while len(self._free) < count:
            self._free.append(self.snapshots.popitem(last=False)[1])
        self.held[request_id] = [self._free.pop() for _ in range(count)]
        return True

    def hand_over(self, request_id: str, child_id: str) -> tuple[int, int] | None:
        """Gives a child one of the rows that its parent holds for it; returns the parent's own row and this one."""
        rows = self.held[request_id]
        if len(rows) < 2:
            return None
        self.held[child_id] = [rows.pop()]
        return rows[0], self.held[child_id][0]

    def release(self, request_id: str) -> None:
        """Takes back what a request holds, if anything."""
        self._free.extend(self.held.pop(request_id, []))

    def keep_snapshot(self, name: Hashable) -> int | None:
        """Returns a free row for a snapshot of this name, or None: a request's row is never taken for it."""
        if not self._free or name in self.snapshots:
            return None
        self.snapshots[name] = self._free.pop()
        return self.snapshots[name]

    def use_snapshot(self, name: Hashable) -> int:
        """Returns the row of a snapshot, which from now on is the one that was used last."""
        self.snapshots.move_to_end(name)
        return self.snapshots[name]

    def forget_snapshots(self) -> None:
        """Gives up all snapshots."""
        self._free.extend(self.snapshots.values())
        self.snapshots.clear()
