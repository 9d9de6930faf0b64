"""One stage of a distillation: the importance alone, all weights, or an adapter that is merged afterwards."""

import gc
import shutil
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import PreTrainedModel, TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint

from flash_dmattn_hf.training.compiled_layers import check_checkpointing
from flash_dmattn_hf.training.distillation import DistillationTrainer
from flash_dmattn_hf.training.distillation_arguments import DistillationArguments
from flash_dmattn_hf.training.far_reuse import FarReuse
from flash_dmattn_hf.training.held_out import HeldOut
from flash_dmattn_hf.training.recipe import STAGES, Recipe

MOST_STEPS = 10**6
"""Steps of a run that is limited by time."""


def train_stage(
    model: PreTrainedModel,
    stage: str,
    recipe: Recipe,
    input_ids: torch.Tensor,
    folder: Path,
    *,
    leading: Sequence[int] = (),
    values: Sequence[Sequence[int]] = (),
    held_out: HeldOut | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> tuple[PreTrainedModel, list[dict[str, float]]]:
    """Trains a converted model, in place, on its device; goes on from the last checkpoint in `folder` if there is one.

    input_ids: (N,) token ids of the text. leading: special token ids in front of every stretch.
    values: of the facts that are planted in some of them, as from `random_values`; without any there are no facts.
    Returns the model in eval mode, an adapter merged into it, and the log. Raises ValueError if nothing can be learned.
    """
    use_cache, is_cuda = model.config.use_cache, model.device.type == "cuda"
    limit = {"max_steps": MOST_STEPS, **recipe.limit_of(stage)}
    first, last = recipe.temperatures[stage]
    arguments = DistillationArguments(
        output_dir=str(folder),
        **limit,
        per_device_train_batch_size=recipe.batch_size,
        gradient_accumulation_steps=recipe.gradient_accumulation_steps,
        learning_rate=recipe.learning_rate,
        gate_learning_rate=recipe.gate_learning_rates[stage],
        first_temperature=first,
        last_temperature=last,
        attention_weight=recipe.attention_weights[stage],
        selection_band=recipe.selection_band,
        hard_share=recipe.hard_share if stage == recipe.stages[-1] else 0.0,
        num_evaluations=recipe.evaluations,
        compile_layers=recipe.compile,
        bf16=is_cuda and torch.cuda.is_bf16_supported(),
        use_cpu=not is_cuda,
        dataloader_pin_memory=is_cuda,
        seed=recipe.seed,
        logging_steps=10,
        save_steps=recipe.save_steps,
        save_total_limit=1,
        report_to="none",
        disable_tqdm=True,
    )
    examples = limit["max_steps"] * recipe.batch_size * recipe.gradient_accumulation_steps
    # Every stage reads other stretches.
    seed = len(STAGES) * recipe.seed + STAGES.index(stage)
    data = FarReuse(
        input_ids,
        length=recipe.length,
        count=examples,
        seed=seed,
        leading=leading,
        values=values,
        answer_weight=recipe.answer_weight,
    )
    if recipe.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    model.requires_grad_(stage == "all")
    trained = _adapted(model, recipe) if stage == "all" and recipe.lora_rank is not None else model
    trainer = DistillationTrainer(trained, arguments, train_dataset=data, held_out=held_out, callbacks=callbacks)
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=_last_checkpoint(folder))

    log = trainer.state.log_history
    trained = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    model = trained if trained is model else trained.merge_and_unload()
    if recipe.gradient_checkpointing:
        model.gradient_checkpointing_disable()
    model.config.use_cache = use_cache  # the Trainer switches it off
    del trainer, trained
    gc.collect()
    if is_cuda:
        torch.cuda.empty_cache()
    return model.eval(), log


def _last_checkpoint(folder: Path) -> str | None:
    """Returns the last checkpoint of a run. Those that an interruption left half written are removed."""
    for started in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        if not (started / TRAINER_STATE_NAME).is_file():  # a Trainer writes it last
            shutil.rmtree(started)
    return get_last_checkpoint(str(folder)) if folder.is_dir() else None


def check_packages(recipe: Recipe) -> None:
    """Raises ImportError if a stage of the recipe needs a package that is not installed, or a newer one."""
    if recipe.compile and recipe.gradient_checkpointing:
        check_checkpointing()
    if recipe.lora_rank is not None and find_spec("peft") is None:
        raise ImportError("an adapter needs the package peft: pip install peft")


def _adapted(model: PreTrainedModel, recipe: Recipe):
    check_packages(recipe)
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(recipe.seed)
    rank = recipe.lora_rank
    options = {"target_modules": "all-linear", "modules_to_save": ["dma"], "task_type": "CAUSAL_LM"}
    adapted = get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, **options))
    if recipe.gradient_checkpointing:
        adapted.enable_input_require_grads()
    return adapted
