"""The settings of a distillation: those of transformers' Trainer, and the few it adds."""

import math
from dataclasses import dataclass

from transformers import TrainingArguments

GATE_LEARNING_RATES = {"importance": 1e-2, "all": 1e-2}
TEMPERATURES = {"importance": (0.3, 0.02), "all": (0.15, 0.02)}
"""First and last temperature where a stage is given none: of the importance alone, and of all weights or an adapter."""

ATTENTION_WEIGHTS = {"importance": 10.0, "all": 10.0}


@dataclass
class DistillationArguments(TrainingArguments):
    """TrainingArguments with other defaults, and:

    gate_learning_rate: the largest, of dt_proj; None: `GATE_LEARNING_RATES`. learning_rate is that of the backbone.
    first_temperature, last_temperature: of the soft selection, geometric in between; None: `TEMPERATURES`.
    attention_weight: of the error of the layers' attention outputs in the loss. None: `ATTENTION_WEIGHTS`, or 0 with a
        teacher that is given.
    selection_band: how many contested keys a query sees, in multiples of those it keeps; None: all.
    hard_share: share of the run, at its end, with the hard mask.
    max_minutes: the run ends after so many minutes of training if not after max_steps; evaluations do not count.
    clip_norm: largest norm of the gradient, of gates and backbone each.
    compile_layers: torch.compile the decoder layers of student and teacher while it trains (`compiled_layers`).
    num_evaluations: how often a run measures on the held-out text, at equal distances.

    Raises ValueError for values out of range.
    """

    learning_rate: float = 5e-5
    per_device_train_batch_size: int = 4
    adam_beta2: float = 0.95
    max_grad_norm: float = 0.0
    remove_unused_columns: bool = False
    logging_nan_inf_filter: bool = False  # it would wait for the GPU at every step
    train_sampling_strategy: str = "sequential"
    gate_learning_rate: float | None = None
    first_temperature: float | None = None
    last_temperature: float | None = None
    attention_weight: float | None = None
    selection_band: float | None = 1.5
    hard_share: float = 0.0
    max_minutes: float | None = None
    clip_norm: float = 1.0
    compile_layers: bool = False
    num_evaluations: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("gate_learning_rate", "first_temperature", "last_temperature", "max_minutes", "clip_norm"):
            number = getattr(self, name)
            if number is not None and not 0 < number < math.inf:
                raise ValueError(f"{name} must be above 0, got {number}")
        if self.attention_weight is not None and not 0 <= self.attention_weight < math.inf:
            raise ValueError(f"attention_weight must be None or at least 0, got {self.attention_weight}")
        if self.selection_band is not None and not 1 <= self.selection_band < math.inf:
            raise ValueError(f"selection_band must be None or at least 1, got {self.selection_band}")
        if not 0 <= self.hard_share < 1:
            raise ValueError(f"hard_share must be at least 0 and below 1, got {self.hard_share}")
        if self.num_evaluations < 0:
            raise ValueError(f"num_evaluations must be at least 0, got {self.num_evaluations}")
        if self.max_grad_norm > 0:
            raise ValueError(f"max_grad_norm must be 0, got {self.max_grad_norm}: clip_norm clips gates and backbone")
