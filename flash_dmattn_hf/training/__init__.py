"""Training models with dynamic masks: parameter groups for the importance, and a loss without logits."""

from flash_dmattn_hf.training.importance import (
    ImportanceCallback,
    Probe,
    freeze_all_but_importance,
    importance_parameters,
    parameter_groups,
    probe,
)
from flash_dmattn_hf.training.loss import use_chunked_loss

__all__ = [
    "ImportanceCallback",
    "Probe",
    "freeze_all_but_importance",
    "importance_parameters",
    "parameter_groups",
    "probe",
    "use_chunked_loss",
]
