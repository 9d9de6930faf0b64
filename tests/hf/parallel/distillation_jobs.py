"""A DistillationTrainer with `ParallelismConfig(cp_size=2)` and FSDP2, on CPUs, and the same one in one process."""

from typing import Any

import peft
import torch

from ..tiny import tiny_model
from ..training.distillation_setup import freeze_backbone, held_out, make_model, make_trainer
from .trainer_jobs import enter_environment, let_fsdp_run_on_cpus, on_ranks

FIGURES = ("loss", "kld", "top1", "held_out/kld", "held_out/loss", "held_out/window_loss")


def _importance():
    model = make_model()
    freeze_backbone(model)
    return model, {}


def _adapter():
    torch.manual_seed(3)
    lora = peft.LoraConfig(r=4, target_modules="all-linear", modules_to_save=["dma"], task_type="CAUSAL_LM")
    return peft.get_peft_model(make_model(), lora), {}


STUDENTS = {
    "importance": _importance,
    "all weights": lambda: (make_model(), {}),
    "adapter": _adapter,
    "hidden states": lambda: (make_model(importance_input="hidden"), {}),
    "sliding, softcap": lambda: (make_model("gemma2"), {}),
    "given teacher": lambda: (make_model(), {"teacher": tiny_model("llama", initializer_range=0.3, seed=5)}),
}


def distil(name: str, folder: str, cp_size: int = 1) -> dict[str, Any]:
    """Trains three steps; returns the figures of the log by name, and of the weights the sum of each."""
    model, given = STUDENTS[name]()
    options = {} if cp_size == 1 else on_ranks(cp_size)
    trainer = make_trainer(
        model,
        folder,
        max_steps=3,
        count=64,
        per_device_train_batch_size=2,
        held_out=held_out(max_stretches=1),
        num_evaluations=1,
        **given,
        **options,
    )
    trainer.train()
    found = {each: [entry[each] for entry in trainer.state.log_history if each in entry] for each in FIGURES}
    weights = {key: getattr(p, "full_tensor", lambda p=p: p)() for key, p in trainer.model.named_parameters()}
    return found | {key: weight.detach().double().norm().item() for key, weight in weights.items()}


def distil_on_ranks(rank: int, names: list[str], folder: str) -> dict[str, dict[str, Any]]:
    enter_environment(rank)
    let_fsdp_run_on_cpus()
    return {name: distil(name, folder, cp_size=2) for name in names}
