"""A tiny converted model whose far keys matter, text to distil it on, and a DistillationTrainer."""

from pathlib import Path

import torch

from flash_dmattn_hf import Calibration, DynamicMaskConfig, convert_model
from flash_dmattn_hf.training.distillation import DistillationTrainer
from flash_dmattn_hf.training.distillation_arguments import DistillationArguments
from flash_dmattn_hf.training.far_reuse import FarReuse
from flash_dmattn_hf.training.held_out import HeldOut

from ..tiny import tiny_model, tokens

WINDOW = 16
LENGTH = 64
WINDOWS = {"keep_window_size": WINDOW, "num_sink_tokens": 2, "local_window_size": 4}
SETTINGS = {**WINDOWS, "add_importance_bias": False, "dt_proj_bias": True}


def text(count: int = 4000, seed: int = 0) -> torch.Tensor:
    return tokens(1, count, seed=seed)[0]


def make_model(model_type: str = "llama", *, calibrated: bool = True, seed: int = 0, **settings):
    """A converted random model in float32; its backbone trains until it is frozen."""
    model = tiny_model(model_type, initializer_range=0.3, seed=seed)
    calibration = Calibration(text(1600, seed=2), stretch_length=160) if calibrated else None
    return convert_model(model, DynamicMaskConfig(**{**SETTINGS, **settings}), calibration=calibration)


def held_out(**values) -> HeldOut:
    return HeldOut(text(256, seed=1), context_length=LENGTH, **values)


def make_trainer(model, folder: Path, *, count: int = 4000, trainer=DistillationTrainer, **options):
    """`options`: arguments of the trainer, or fields of DistillationArguments."""
    given = {name: options.pop(name) for name in ("teacher", "held_out", "callbacks") if name in options}
    values = {
        "output_dir": str(folder),
        "max_steps": 8,
        "per_device_train_batch_size": 4,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        **options,
    }
    data = FarReuse(text(), length=LENGTH, count=count)
    return trainer(model, DistillationArguments(**values), train_dataset=data, **given)


def freeze_backbone(model) -> dict[str, torch.Tensor]:
    """Leaves the importance alone trainable; returns copies of all other weights."""
    model.requires_grad_(False)
    return {name: p.clone() for name, p in model.named_parameters() if ".dma." not in name}


def log_of(trainer, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


