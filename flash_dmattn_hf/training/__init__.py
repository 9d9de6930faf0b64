"""Training models with dynamic masks: parameter groups for the importance, and schedules, and a loss without logits."""

from flash_dmattn_hf.training.importance import (
    ImportanceCallback,
    Probe,
    freeze_all_but_importance,
    importance_parameters,
    parameter_groups,
    probe,
)
from flash_dmattn_hf.training.loss import use_chunked_loss
from flash_dmattn_hf.training.temperature import TemperatureCallback, geometric_schedule

__all__ = [
    "ImportanceCallback",
    "Probe",
    "TemperatureCallback",
    "freeze_all_but_importance",
    "geometric_schedule",
    "importance_parameters",
    "parameter_groups",
    "probe",
    "use_chunked_loss",
]
