"""Distillation: a model with dynamic masks learns, through a soft cut, to predict what the dense model predicts."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.data import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainerCallback
from transformers.trainer_utils import TrainOutput

from flash_dmattn_hf.gates.attach import iter_gates
from flash_dmattn_hf.gates.importance import Gate
from flash_dmattn_hf.gates.soft_selection import hard_selection, soft_selection
from flash_dmattn_hf.parallel.context import active
from flash_dmattn_hf.training.attention_outputs import AttentionOutputs, attention_error
from flash_dmattn_hf.training.compiled_layers import compiled_layers
from flash_dmattn_hf.training.deferred_logits import deferred_logits, deferring_layer
from flash_dmattn_hf.training.distillation_arguments import (
    ATTENTION_WEIGHTS,
    GATE_LEARNING_RATES,
    TEMPERATURES,
    DistillationArguments,
)
from flash_dmattn_hf.training.distillation_batch import collate, loss_of_batch, weights_of_tokens
from flash_dmattn_hf.training.distillation_checks import check_student
from flash_dmattn_hf.training.distillation_course import DistillationCourse
from flash_dmattn_hf.training.distillation_optimizer import make_optimizer
from flash_dmattn_hf.training.gate_preparation import prepare_gates
from flash_dmattn_hf.training.held_out import WINDOW_LOSS, HeldOut
from flash_dmattn_hf.training.standardized_inputs import StandardizedLayer
from flash_dmattn_hf.training.teacher import make_teacher
from flash_dmattn_hf.training.temperature import geometric_schedule

NUM_MEASURED = 4
"""Training examples on which the inputs of dt_proj are measured."""


class DistillationTrainer(Trainer):
    """A Trainer whose loss is KL(teacher || model) over the vocabulary, in nats per token, with soft selection.

    In training, attention_weight times the error of the layers' attention outputs is added to it (`attention_error`).

    What trains is what requires a gradient: with the backbone frozen the importance alone, else all weights, or an
    adapter of PEFT (`modules_to_save=["dma"]`). dt_proj of every gate always trains, `A` never
    (`training.gate_preparation` says why). Learning rates and temperature follow `training.distillation_course`.

    model: a converted causal language model, or one inside a PeftModel. Start from a calibrated one.
    train_dataset: examples with input_ids (S,), such as `FarReuse`; token_weights (S,) and attention_mask (S,) where
        there are. The weights of an example count in proportion, and every example counts the same.
    teacher: a model with the same vocabulary; None: the model itself with dense attention, its adapter off, or a frozen
        copy of it where all weights train (in bfloat16 under bfloat16 autocast).
    held_out: text on which the model is measured with the hard mask, `num_evaluations` times.

    Added to the log: kld (unweighted), top1, attention_error (if it has a weight), temperature, gate_learning_rate,
    tokens_per_second, and of held-out text `held_out/kld`, `held_out/top1`, `held_out/gap` and one figure for each task
    of the prompts.

    Raises ValueError for a model without gates, or whose trained weights are not float32 (in bfloat16 most steps would
    round away; autocast, `bf16`, loses nothing), a teacher with another vocabulary, or without the student's attention
    modules if their error has a weight, an output layer that is no plain linear layer, ZeRO-3, or a hard_share in which
    nothing would have a gradient. ImportError for compile_layers with gradient checkpointing in an older transformers.
    """

    def __init__(
        self,
        model: PreTrainedModel | nn.Module,
        args: DistillationArguments,
        *,
        train_dataset: Dataset,
        teacher: nn.Module | None = None,
        held_out: HeldOut | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        callbacks: Sequence[TrainerCallback] = (),
    ) -> None:
        trains_backbone = check_student(model, args)
        if args.n_gpu > 1:
            args._n_gpu = 1  # or the Trainer would use DataParallel, whose threads share one output layer
        _forget_preparation(model)
        super().__init__(
            model,
            args,
            data_collator=collate,
            train_dataset=train_dataset,
            processing_class=processing_class,
            callbacks=[*callbacks, _Conductor(self)],
        )
        self.model_accepts_loss_kwargs = False  # the loss is a mean, to be divided by the accumulation steps
        self.teacher = make_teacher(
            self.model,
            None if teacher is None else teacher.to(args.device),
            trains_backbone=trains_backbone,
            dtype=torch.bfloat16 if args.bf16 else None,
            device=args.device if self.is_fsdp_enabled else None,  # FSDP2 moves the student later
        )
        self.held_out = held_out
        stage = "all" if trains_backbone else "importance"
        self.gate_learning_rate = args.gate_learning_rate or GATE_LEARNING_RATES[stage]
        first, last = TEMPERATURES[stage]
        self.temperature_of = geometric_schedule(args.first_temperature or first, args.last_temperature or last)
        self._softly, self._soft = ExitStack(), None
        self.attention_weight = args.attention_weight
        if self.attention_weight is None:
            self.attention_weight = ATTENTION_WEIGHTS[stage] if teacher is None else 0.0
        if self.attention_weight:
            AttentionOutputs(self.model, self.teacher.model)  # raises where there are none to compare
        self._outputs: AttentionOutputs | None = None
        self._layers: list[StandardizedLayer] = []
        self._seen: list[torch.Tensor] = []
        self._num_tokens, self._seconds, self._gate_rate = 0, 0.0, 0.0

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """As of Trainer. The importance is trainable, and selected softly, until it returns."""
        softly = soft_selection(self.model, temperature=self.temperature_of(0.0), band=self.args.selection_band)
        self.optimizer = self.lr_scheduler = None
        with ExitStack() as afterwards, self._softly:
            afterwards.enter_context(deferring_layer(self.model))
            if self.attention_weight:
                self._outputs = afterwards.enter_context(AttentionOutputs(self.model, self.teacher.model))
                afterwards.callback(setattr, self, "_outputs", None)
            gates = [gate for _, _, gate in iter_gates(self.model)]
            for gate in gates:
                for name, parameter in [("A", gate.A), *gate.dt_proj.named_parameters(prefix="dt_proj")]:
                    afterwards.callback(_set_requires_grad, gate, name, parameter.requires_grad)
                    parameter.requires_grad_(True)
            self._soft = self._softly.enter_context(softly)
            for gate in gates:
                gate.A.requires_grad_(False)
            count = min(NUM_MEASURED, len(self.train_dataset))
            stretches = [torch.as_tensor(self.train_dataset[index]["input_ids"]) for index in range(count)]
            with hard_selection():
                self._layers = prepare_gates(self.model, stretches)
            if self.args.compile_layers:
                afterwards.enter_context(self._compiled())
            return super().train(*args, **kwargs)

    @contextmanager
    def _compiled(self) -> Iterator[None]:
        """Inside the block the layers of student and teacher are compiled, unless the teacher was given."""
        self.teacher.runs_compiled = True
        try:
            with compiled_layers(self.model, self.teacher.model):
                yield
        finally:
            self.teacher.runs_compiled = False

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW over the backbone and dt_proj, whose inputs it sees standardised; each is clipped alone."""
        if self.optimizer is not None:
            return self.optimizer
        self.optimizer = make_optimizer(self.model, self.args, self._layers, self.gate_learning_rate)
        return self.optimizer

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> DistillationCourse:
        """The course of the run, which the temperature follows too."""
        if self.lr_scheduler is None:
            minutes = self.args.max_minutes
            self.lr_scheduler = DistillationCourse(
                self.optimizer if optimizer is None else optimizer,
                max_steps=num_training_steps,
                max_seconds=None if minutes is None else 60 * minutes,
            )
        return self.lr_scheduler

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, dict[str, Any]]:
        """The mean over the examples of their weighted mean KL, (), and in training the weighted error of attention.

        Outputs, if asked for, are none.
        """
        inputs = {name: value for name, value in inputs.items() if name != "labels"}
        weights = inputs.pop("token_weights", None)
        if (mask := inputs.get("attention_mask")) is not None:
            weights = mask if weights is None else weights * mask
        weights = None if weights is None else weights_of_tokens(weights.float(), active.slot.content)
        outputs = self._outputs if model.training else None
        with self.accelerator.autocast(), outputs.of_teacher() if outputs else nullcontext() as expected_outputs:
            expected = self.teacher.logits(inputs)
        with deferred_logits(self.model), outputs.of_student() if outputs else nullcontext() as found_outputs:
            found = model(**inputs, use_cache=False).logits
        result = loss_of_batch(found, expected, weights)
        loss, figures = result.loss, [result.kld, result.top1]
        if outputs is not None:
            error = attention_error(found_outputs, expected_outputs, weights, active.slot.content)
            loss = loss + self.attention_weight * error
            figures.append(error)
        self._seen.append(torch.stack([figure.detach().float() for figure in figures]))
        self._num_tokens += inputs["input_ids"].numel()
        return (loss, {}) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As of Trainer; an entry with a loss gets the figures of the steps since the last."""
        if "loss" in logs:
            logs |= self._figures()
        super().log(logs, start_time)

    def _figures(self) -> dict[str, float]:
        kld, top1, *error = self.accelerator.reduce(torch.stack(self._seen).mean(0), "mean").tolist()
        seconds = self.lr_scheduler.seconds
        figures = {
            "kld": kld,
            "top1": top1,
            "gate_learning_rate": self._gate_rate,
            "tokens_per_second": self._num_tokens * self.accelerator.num_processes / max(seconds - self._seconds, 1e-9),
        }
        if error:
            figures["attention_error"] = error[0]
        if self._soft is not None:
            figures["temperature"] = self._soft.temperature
        self._seen, self._num_tokens, self._seconds = [], 0, seconds
        return figures

    def follow(self, share: float) -> None:
        """Sets the temperature for the step that begins when this share of the run is over."""
        self._gate_rate = self.optimizer.param_groups[-1]["lr"]
        soft_share = 1 - self.args.hard_share
        if self._soft is not None and share < soft_share:
            self._soft.temperature = self.temperature_of(share / soft_share)
        elif self._soft is not None and self.args.hard_share:
            self._softly.close()
            self._soft = None

    def measure(self) -> None:
        """Measures the model on the held-out text, with the hard mask, and logs it."""
        # With FSDP2 a forward needs all processes.
        if self.held_out is None or not (self.is_world_process_zero() or self.accelerator.is_fsdp2):
            return
        known = [entry[WINDOW_LOSS] for entry in self.state.log_history if WINDOW_LOSS in entry]
        with hard_selection(), self.lr_scheduler.paused():
            figures = {} if known else {WINDOW_LOSS: self.held_out.window_loss(self.model, self.teacher)}
            window_loss = (known or list(figures.values()))[0]
            figures |= self.held_out.measure(self.model, self.teacher, window_loss)
        should_log = self.control.should_log
        self.log(figures)
        self.control.should_log = should_log  # any log entry would take the place of the one that is due


class _Conductor(TrainerCallback):
    """Sets the temperature before every step, measures between steps, and ends the run when its time is over."""

    def __init__(self, trainer: DistillationTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args, state, control, lr_scheduler=None, **kwargs) -> None:
        self.trainer.teacher.follow(self.trainer.model)
        _keep_output_layer(self.trainer.model)
        if state.global_step == 0:
            self.trainer.measure()
        self.share = lr_scheduler.share
        self.trainer._seconds = lr_scheduler.seconds
        lr_scheduler.start()

    def on_step_begin(self, args, state, control, lr_scheduler=None, **kwargs) -> None:
        self.trainer.follow(lr_scheduler.share)

    def on_step_end(self, args, state, control, lr_scheduler=None, **kwargs) -> None:
        before, self.share = self.share, lr_scheduler.share
        if int(before * args.num_evaluations) < int(self.share * args.num_evaluations):
            self.trainer.measure()
        if self.share >= 1:
            control.should_training_stop = True


def _forget_preparation(model: nn.Module) -> None:
    """Removes accelerate's mark from every module that has no autocast any more.

    accelerate skips a model with the mark, which unwrapping leaves, and finds it through wrappers as of PEFT.
    """
    for module in model.modules():
        if "_original_forward" not in vars(module):
            vars(module).pop("_is_accelerate_prepared", None)


def _set_requires_grad(gate: Gate, name: str, value: bool) -> None:
    gate.get_parameter(name).requires_grad_(value)  # by its name: FSDP2 replaces parameters


def _keep_output_layer(model: nn.Module) -> None:
    """Lets FSDP2 keep the output layer whole until the backward: the loss needs it when the forward is over."""
    head = (model.get_base_model() if hasattr(model, "get_base_model") else model).get_output_embeddings()
    for module in (model, head):
        if isinstance(module, FSDPModule):
            module.set_reshard_after_forward(False, recurse=False)
