"""Prefixes that several prompts share: the first request that has one leaves a snapshot, the others start from it.

A snapshot is a row of slots at the end of the prefix. It is exact and of constant size, however long the prefix is.
Prefixes are compared at multiples of a page of tokens.
"""

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Container

MOST_REMEMBERED = 1 << 16


class Prefixes:
    """What is known of the prompts so far, by the digests of their prefixes.

    page: prefixes end at multiples of it.
    """

    def __init__(self, page: int):
        self.page = page
        self.reset()

    def reset(self) -> None:
        """Forgets all prompts, those of requests that have not started included."""
        self._ends: dict[str, list[tuple[int, bytes]]] = {}  # of live requests: lengths and digests, the longest first
        self._seen: OrderedDict[bytes, int] = OrderedDict()  # digest -> how many prompts began like this
        self._owners: dict[bytes, str] = {}  # digest -> request that is about to leave a snapshot there

    def add(self, request_id: str, prompt: list[int]) -> None:
        """Takes note of the prompt of a request that arrives. The last token is never part of a prefix."""
        ends, last = [], b""
        for start in range(0, len(prompt) - self.page, self.page):
            last = _digest(last, prompt[start : start + self.page])
            ends.append((start + self.page, last))
            self._seen[last] = self._seen.pop(last, 0) + 1
        while len(self._seen) > MOST_REMEMBERED:
            self._seen.popitem(last=False)
        self._ends[request_id] = ends[::-1]

    def drop(self, request_id: str) -> None:
        """Forgets a request that has ended; that its prompt was seen stays known."""
        for _, name in self._ends.pop(request_id, []):
            if self._owners.get(name) == request_id:
                del self._owners[name]

    def longest_of(self, request_id: str, names: Container[bytes]) -> tuple[int, bytes] | None:
        """Returns length and digest of the request's longest prefix among `names`, None if there is none."""
        return next(((length, name) for length, name in self._ends.get(request_id, []) if name in names), None)

    def may_start(self, request_id: str, names: Container[bytes]) -> bool:
        """Returns False while another request is about to leave a snapshot that this one can start from.

        names: of the snapshots there are. A request with a prefix that others share, and that is not among them, is
        from now on the one that leaves it.
        """
        shared = next((name for _, name in self._ends.get(request_id, []) if self._seen.get(name, 0) > 1), None)
        if shared is None or shared in names:
            return True
        return self._owners.setdefault(shared, request_id) == request_id

    def end_of(self, request_id: str, current_length: int) -> int | None:
        """Returns the next length at which a request of `current_length` tokens leaves a snapshot, None if it has none.

        A length that it has passed is no longer its own: another request may leave that snapshot.
        """
        owned = [end for end in self._ends.get(request_id, []) if self._owners.get(end[1]) == request_id]
        for length, name in owned:
            if length <= current_length:
                del self._owners[name]
        return min((length for length, _ in owned if length > current_length), default=None)

    def arrive(self, request_id: str, length: int) -> bytes:
        """Returns the digest under which a request leaves its snapshot now; it leaves no other there."""
        name = dict(self._ends[request_id])[length]
        del self._owners[name]
        return name


def _digest(before: bytes, tokens: list[int]) -> bytes:
    """Returns the digest of a prefix, from that of the page before its last.

    It stands for the tokens themselves, so it is too wide for strangers to find two prompts that share one.
    """
    return hashlib.blake2b(before + array("q", tokens).tobytes(), digest_size=32).digest()
