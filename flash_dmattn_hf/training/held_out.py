"""What a model is worth on text that it is not trained on: agreement with the teacher, share of the gap, recall."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from flash_dmattn_hf.evaluation.agreement import Agreement, agreement, share_of_gap
from flash_dmattn_hf.evaluation.prompts import Prompt
from flash_dmattn_hf.evaluation.recall import over_depths, recall
from flash_dmattn_hf.evaluation.rows import rows_of
from flash_dmattn_hf.gates.attach import iter_gates
from flash_dmattn_hf.training.teacher import Teacher

WINDOW_LOSS = "held_out/window_loss"


@dataclass(frozen=True)
class HeldOut:
    """The text to measure on.

    input_ids: (N,) integer token ids without special tokens. context_length, leading, max_stretches: as for
    `evaluation.agreement`, on rows beyond keep_window_size. prompts: from `evaluation.recall_prompts`; none: no recall.

    Raises ValueError for a text shorter than one stretch.
    """

    input_ids: torch.Tensor
    context_length: int
    leading: Sequence[int] = ()
    max_stretches: int | None = None
    prompts: Sequence[Prompt] = field(default_factory=tuple)

    def __post_init__(self) -> None:
        needed = self.context_length - len(self.leading)
        if self.input_ids.numel() < needed:
            raise ValueError(f"held-out text must hold at least {needed} tokens, got {self.input_ids.numel()}")

    def window_loss(self, model: nn.Module, teacher: Teacher) -> float:
        """Returns the loss of a model with its importance set to 0, in nats per token: sinks and window."""
        window = next(iter_gates(model))[2].config.keep_window_size
        _, plain, _ = rows_of(model, [window])
        with plain.variant:
            return self._agreement(model, teacher).loss

    def measure(self, model: nn.Module, teacher: Teacher, window_loss: float) -> dict[str, float]:
        """Returns names and figures for a log; `held_out/gap` is missing if dense is no better than sinks + window."""
        near = self._agreement(model, teacher)
        figures = {"kld": near.kld, "top1": near.top1, "loss": near.loss, "dense_loss": near.reference_loss}
        gap = share_of_gap(near.loss, window_loss, near.reference_loss)
        if gap is not None:
            figures["gap"] = gap
        for cell in over_depths(recall(model, self.prompts)):
            figures[cell.task] = cell.all_right
        return {f"held_out/{name}": figure for name, figure in figures.items()}

    def _agreement(self, model: nn.Module, teacher: Teacher) -> Agreement:
        return agreement(
            model,
            self.input_ids,
            context_length=self.context_length,
            first_row=next(iter_gates(model))[2].config.keep_window_size,
            reference=teacher.model,
            reference_mode=teacher.mode,
            leading=self.leading,
            max_stretches=self.max_stretches,
        )
