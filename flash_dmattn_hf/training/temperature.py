"""Schedules for the temperature of a soft selection."""

import math
from collections.abc import Callable

from transformers import TrainerCallback

from flash_dmattn_hf.gates.soft_selection import SoftSelection


def geometric_schedule(start: float, end: float) -> Callable[[float], float]:
    """Returns temperature(f) = start * (end / start) ** f for the share f of training that is done, from 0 to 1.

    Raises ValueError unless both are above 0.
    """
    for name, temperature in (("start", start), ("end", end)):
        if not 0 < temperature < math.inf:
            raise ValueError(f"{name} must be above 0, got {temperature}")
    return lambda done: start * (end / start) ** done


class TemperatureCallback(TrainerCallback):
    """Sets the temperature of a soft selection before every step of a Trainer, and adds it to the log.

    soft: what `soft_selection` returned; train inside its block. schedule: share of the steps done -> temperature; the
        first step has that of 0, the last that of 1.
    """

    def __init__(self, soft: SoftSelection, schedule: Callable[[float], float]) -> None:
        self.soft, self.schedule = soft, schedule

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        self.soft.temperature = self.schedule(state.global_step / max(state.max_steps - 1, 1))

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        if "loss" in logs:
            logs["dma/temperature"] = self.soft.temperature
            state.log_history[-1]["dma/temperature"] = self.soft.temperature
