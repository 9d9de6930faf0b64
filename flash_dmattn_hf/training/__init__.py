"""Training models with dynamic masks: distillation, groups for the importance, schedules, losses in chunks."""

from flash_dmattn_hf.training.distillation import DistillationTrainer
from flash_dmattn_hf.training.distillation_arguments import DistillationArguments
from flash_dmattn_hf.training.distillation_loss import Distillation, chunked_distillation_loss
from flash_dmattn_hf.training.far_reuse import FarReuse
from flash_dmattn_hf.training.held_out import HeldOut
from flash_dmattn_hf.training.importance import (
    ImportanceCallback,
    Probe,
    freeze_all_but_importance,
    importance_parameters,
    parameter_groups,
    probe,
)
from flash_dmattn_hf.training.loss import use_chunked_loss
from flash_dmattn_hf.training.planted_facts import random_values
from flash_dmattn_hf.training.recipe import Recipe
from flash_dmattn_hf.training.stages import train_stage
from flash_dmattn_hf.training.temperature import TemperatureCallback, geometric_schedule

__all__ = [
    "Distillation",
    "DistillationArguments",
    "DistillationTrainer",
    "FarReuse",
    "HeldOut",
    "ImportanceCallback",
    "Probe",
    "Recipe",
    "TemperatureCallback",
    "chunked_distillation_loss",
    "freeze_all_but_importance",
    "geometric_schedule",
    "importance_parameters",
    "parameter_groups",
    "probe",
    "random_values",
    "train_stage",
    "use_chunked_loss",
]
