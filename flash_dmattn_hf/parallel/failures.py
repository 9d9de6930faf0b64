"""Why a rank has failed, told to the others, whose collectives only say that somebody is gone."""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

_numbers = itertools.count()


class PeerFailure(RuntimeError):
    """Another rank has failed, and has said why."""


class Failures:
    """What the ranks of one group tell each other while they do one thing together, whose name is `what`.

    All of them make it, and in the same order as other such objects.
    """

    def __init__(self, what: str, group: dist.ProcessGroup) -> None:
        self.what, self._rank = what, dist.get_rank(group)
        self._key = f"flash_dmattn_hf/{what}/{group.group_name}/{next(_numbers)}"

    def report(self, error: BaseException) -> None:
        """Tells the others about an error of this rank, unless it is the failure of one of them.

        Raises PeerFailure for an error that another rank has caused: a collective that is not watched, such as one of
        FSDP2, fails after that rank has reported.
        """
        if isinstance(error, PeerFailure):
            return
        if reason := self._reason(error):
            raise PeerFailure(reason) from error
        _store().set(self._key, f"rank {self._rank}: {type(error).__name__}: {error}")

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Around what needs the others: raises PeerFailure if it fails after another rank has reported an error."""
        try:
            yield
        except RuntimeError as error:
            if reason := self._reason(error):
                raise PeerFailure(reason) from error
            raise

    def _reason(self, error: BaseException) -> str:
        """Returns why another rank has failed, "" if none has said so, or nobody can be asked any more.

        An error of a kind that no collective raises, such as that of memory that is not there, has no other reason.
        """
        if not (type(error) is RuntimeError or isinstance(error, dist.DistError)):
            return ""
        try:
            if not _store().check([self._key]):
                return ""
            return f"{self.what} ends because {_store().get(self._key).decode()}"
        except RuntimeError:  # the process that kept the reasons has ended
            return ""


def _store() -> dist.Store:
    return dist.distributed_c10d._get_default_store()
