"""A DistillationTrainer with `ParallelismConfig(cp_size=2)` and FSDP2, on CPUs, and the same one in one process."""

from typing import Any

import peft
import torch

from flash_dmattn_hf.training import compiled_layers

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


def distil(name: str, folder: str, cp_size: int = 1, resume: str | None = None, **options: Any) -> dict[str, Any]:
    """Trains three steps; returns the figures of the log by name, and of the weights the norm of each.

    resume: the folder of a checkpoint to go on from. options: of DistillationArguments.
    """
    model, given = STUDENTS[name]()
    if cp_size > 1:
        options.update(on_ranks(cp_size))
    trainer = make_trainer(
        model,
        folder,
        max_steps=3,
        count=64,
        per_device_train_batch_size=2,
        held_out=held_out(max_stretches=1),
        num_evaluations=1,
        adam_epsilon=1e-3,  # a bias that all keys share has a gradient of 0: Adam would make a step of its rounding
        **given,
        **options,
    )
    trainer.train(resume_from_checkpoint=resume)
    found = {each: [entry[each] for entry in trainer.state.log_history if each in entry] for each in FIGURES}
    model = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
    weights = {key: getattr(p, "full_tensor", lambda p=p: p)() for key, p in model.named_parameters()}
    return found | {key: weight.detach().double().norm().item() for key, weight in weights.items()}


def distil_on_ranks(rank: int, names: list[str], folder: str) -> dict[str, dict[str, Any]]:
    enter_environment(rank)
    let_fsdp_run_on_cpus()
    return {name: distil(name, folder, cp_size=2) for name in names}


def resume_on_ranks(rank: int, folder: str) -> dict[str, Any]:
    """Distils compiled, with accumulated gradients, and again from a checkpoint; returns the figures of both runs.

    What FSDP2 shards is the compiled module. It runs the model's own code here, since compiling takes most of the time.
    """
    enter_environment(rank)
    let_fsdp_run_on_cpus()
    options = {"gradient_accumulation_steps": 2, "save_strategy": "steps", "save_steps": 2}
    options |= {"torch_compile": True, "torch_compile_backend": "eager"}
    with torch.compiler.set_stance("force_eager"):
        distil("importance", f"{folder}/whole", cp_size=2, **options)
        return distil("importance", f"{folder}/resumed", cp_size=2, resume=f"{folder}/whole/checkpoint-2", **options)


def compile_layers_on_ranks(rank: int, names: list[str], folder: str) -> dict[str, dict[str, Any]]:
    """Distils with layers that an interpreter of graphs runs: a compiler would take minutes."""
    compiled_layers.BACKEND = "aot_eager"
    enter_environment(rank)
    let_fsdp_run_on_cpus()
    return {name: distil(name, folder, cp_size=2, compile_layers=True) for name in names}
