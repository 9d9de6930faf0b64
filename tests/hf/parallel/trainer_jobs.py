"""A Trainer with `ParallelismConfig(cp_size=2)` and FSDP2, on CPUs, and the same Trainer in one process."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import DistributedType, ParallelismConfig
from accelerate.state import AcceleratorState
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers import Trainer, TrainingArguments

from flash_dmattn_hf import use_chunked_loss

from .. import gpu_models
from .jobs import Case, make_model

ROOT = Path(__file__).resolve().parents[3]
STEPS = 3
CASE = Case((10, 1, 3), model={"tie_word_embeddings": True})


class Rows(torch.utils.data.Dataset):
    """Documents packed into rows of equal length, as position_ids say, whose first tokens have no label.

    How many differs: a rank's mean over its labels weighs otherwise than that of all.
    """

    def __init__(self, length: int = 48, vocabulary: int = 98) -> None:
        generator = torch.Generator().manual_seed(0)
        self.rows = torch.randint(3, vocabulary, (STEPS * 2, length), generator=generator)
        self.positions = torch.cat([torch.arange(length - 17), torch.arange(17)])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        labels = self.rows[index].clone()
        labels[: len(labels) * index // 11] = -100
        return {"input_ids": self.rows[index], "labels": labels, "position_ids": self.positions}


def train(folder: str, cp_size: int = 1, model=None, data=None, resume: str | None = None, **options: Any) -> Trainer:
    """Trains a tiny float32 model, on the CPU unless options say otherwise, and returns its Trainer.

    resume: the folder of a checkpoint to go on from. With bf16, losses and sums of gradients stay in float32, though
    accelerate has FSDP2 round them: 7.53 and 7.56 are neighbours in bfloat16.
    """
    if cp_size > 1:
        options.update(on_ranks(cp_size))
    given = {
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "use_cpu": True,
        "eval_strategy": "steps",
        "save_strategy": "no",
    }
    arguments = TrainingArguments(
        folder,
        per_device_eval_batch_size=2,
        eval_steps=1,
        max_steps=STEPS,
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
        **{**given, **options},
    )
    if model is None:
        model = make_model(CASE).float()
        use_chunked_loss(model, chunk_size=7, engine="torch")
    data = data or Rows()
    trainer = Trainer(model=model, args=arguments, train_dataset=data, eval_dataset=data)
    if options.get("bf16"):
        trainer.accelerator.state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16, reduce_dtype=torch.float32, output_dtype=torch.float32
        )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def on_ranks(cp_size: int) -> dict[str, Any]:
    """Returns the training arguments of several ranks that share every sequence."""
    return {
        "parallelism_config": ParallelismConfig(cp_size=cp_size),
        "fsdp": True,
        "fsdp_config": {"version": 2, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP"},
    }


def losses_of(trainer: Trainer) -> list[float]:
    """Returns the losses of training, and those of the evaluations in between, in their order."""
    return [entry[name] for entry in trainer.state.log_history for name in ("loss", "eval_loss") if name in entry]


def enter_environment(rank: int) -> None:
    """Sets what `accelerate launch` would."""
    world_size = dist.get_world_size()
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT="29511",
    )


def let_fsdp_run_on_cpus() -> None:
    """accelerate offers FSDP2 on accelerators only, though torch's runs on CPUs as well: this offers it there too."""
    original = AcceleratorState.__init__

    def initialize(self, *args, fsdp_plugin=None, **kwargs):
        original(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.fsdp_plugin = fsdp_plugin
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)
        if vars(self).get("fsdp_plugin") is not None:  # whoever asks for the state again gets that of the process
            self.distributed_type = DistributedType.FSDP

    AcceleratorState.__init__ = initialize


def train_on_ranks(rank: int, folder: str) -> list[float]:
    enter_environment(rank)
    let_fsdp_run_on_cpus()
    return losses_of(train(folder, cp_size=2))


SAVED = {"gradient_accumulation_steps": 2, "save_strategy": "steps", "save_steps": STEPS - 1}
"""A run with accumulated gradients that leaves a checkpoint before its last step."""


def resume_on_ranks(rank: int, folder: str) -> list[float]:
    """Saves a checkpoint, goes on from it in a new Trainer, and saves the model; returns the losses of both runs."""
    enter_environment(rank)
    let_fsdp_run_on_cpus()
    train(f"{folder}/whole", cp_size=2, **SAVED)
    trainer = train(f"{folder}/resumed", cp_size=2, resume=f"{folder}/whole/checkpoint-{STEPS - 1}", **SAVED)
    trainer.save_model(f"{folder}/saved")
    return losses_of(trainer)


def fail_while_training(rank: int, folder: str) -> None:
    """Rank 1 fails in the second step of a Trainer, while the others wait for its part of the weights."""
    enter_environment(rank)
    let_fsdp_run_on_cpus()
    model, steps = make_model(CASE).float(), []

    def fail(module, inputs):
        steps.append(module)
        if len(steps) > 1:
            raise ArithmeticError("the second step is one too many")

    if rank == 1:
        model.model.layers[1].self_attn.register_forward_pre_hook(fail)
    train(folder, cp_size=2, model=model, eval_strategy="no")


def run_script(rank: int, model: str, text: str, output: str, *options: str) -> list[float]:
    """Runs scripts/train.py with configs/context_parallel.yaml, made small, and options of the form key=value.

    Returns the losses of its log and that of the evaluation after it.
    """
    sys.path.insert(0, str(ROOT / "scripts"))
    import train as script

    if dist.get_world_size() > 1:
        enter_environment(rank)
        os.environ.update(ACCELERATE_USE_PARALLELISM_CONFIG="true", PARALLELISM_CONFIG_CP_SIZE="2")
        os.environ.update(ACCELERATE_USE_FSDP="true", FSDP_VERSION="2", FSDP_STATE_DICT_TYPE="FULL_STATE_DICT")
        os.environ.update(FSDP_AUTO_WRAP_POLICY="TRANSFORMER_BASED_WRAP")
        let_fsdp_run_on_cpus()
    config = ROOT / "configs" / "context_parallel.yaml"
    small = ["sequence_length=64", "training.max_steps=2", "training.logging_steps=1", "training.warmup_steps=0"]
    small += ["attention.keep_window_size=16", "importance_learning_rate=0.1"]
    cpu = ["training.use_cpu=true", "training.bf16=false", "training.disable_tqdm=true"]
    named = [f"model={model}", f"output_dir={output}", f"train_files=[{text}]", f"eval_files=[{text}]"]
    metrics = script.main([str(config), *small, *cpu, *named, *options])
    dist.barrier()  # rank 0 writes it
    log = json.loads((Path(output) / "trainer_state.json").read_text())["log_history"]
    assert ("eval_loss_before" in metrics) == (dist.get_world_size() == 1)  # FSDP2 has none
    return [entry["loss"] for entry in log if "loss" in entry] + [metrics["eval_loss_after"]]


def train_on_gpus(rank: int, folder: str, **options: Any) -> list[float]:
    """Trains on as many GPUs as there are ranks, which share every sequence, with FSDP2. options: of `train`.

    On one GPU too: FSDP2 rounds every weight to bf16, and autocast only those of products.
    """
    enter_environment(rank)
    model = gpu_models.make_model(device="cpu").train()
    data = Rows(512, gpu_models.VOCABULARY)
    shared = on_ranks(dist.get_world_size())
    if dist.get_world_size() == 1:
        del shared["parallelism_config"]
    return losses_of(train(folder, 1, model, data, use_cpu=False, learning_rate=1e-3, **shared, **options))


def train_in_bf16(rank: int, folder: str) -> list[float]:
    return train_on_gpus(rank, folder, bf16=True)


def train_in_bf16_row_by_row(rank: int, folder: str) -> list[float]:
    """The same steps, whose rounding alone is another."""
    return train_on_gpus(rank, folder, bf16=True, per_device_train_batch_size=1, gradient_accumulation_steps=2)
