"""How far a distillation is, by steps or by time, and the learning rate and temperature that follow from it."""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.optim.lr_scheduler import LRScheduler

WARMUP_STEPS = 30


class DistillationCourse(LRScheduler):
    """The learning rate scheduler of a distillation, which knows how much of the run is over.

    `share` is the larger of the steps taken over `max_steps` and the seconds spent over `max_seconds`. Every learning
    rate is min(1, (step + 1) / WARMUP_STEPS) * sqrt(1 - share) times that of its parameter group, so that a run that is
    limited by time ends as one limited by steps does. Steps and seconds are in the state dict: a resumed run goes on.

    optimizer: whose groups have their largest learning rate. max_steps: at least 1. max_seconds: above 0, or None.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, *, max_steps: int, max_seconds: float | None = None) -> None:
        self.max_steps, self.max_seconds = max_steps, max_seconds
        self.seconds = 0.0
        self._since = time.monotonic()
        super().__init__(optimizer)

    @property
    def share(self) -> float:
        """From 0 to 1."""
        of_time = 0.0 if self.max_seconds is None else self.seconds / self.max_seconds
        return min(1.0, max(self.last_epoch / self.max_steps, of_time))

    def get_lr(self) -> list[float]:
        factor = min(1.0, (self.last_epoch + 1) / WARMUP_STEPS) * math.sqrt(1 - self.share)
        return [rate * factor for rate in self.base_lrs]

    def step(self) -> None:
        """Counts a step, and the time since the last."""
        now = time.monotonic()
        self.seconds += now - self._since
        self._since = now
        if self.max_seconds is not None:
            self.seconds = _of_first_process(self.seconds, self.optimizer)
        super().step()

    def start(self) -> None:
        """Lets the time count from now on."""
        self._since = time.monotonic()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """The time inside the block does not count."""
        before = time.monotonic()
        try:
            yield
        finally:
            self._since += time.monotonic() - before

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs; its limits may be others."""
        return {name: getattr(self, name) for name in ("last_epoch", "seconds", "base_lrs", "_step_count", "_last_lr")}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        vars(self).update(state_dict)


def _of_first_process(seconds: float, optimizer: torch.optim.Optimizer) -> float:
    """All processes follow the clock of the first, or they would stop at different steps."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return seconds
    shared = torch.tensor(seconds, dtype=torch.float64, device=optimizer.param_groups[0]["params"][0].device)
    torch.distributed.broadcast(shared, 0)
    return shared.item()
