"""How much of a text a model can still quote, by task, context and depth."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import nn
from transformers import PreTrainedTokenizerBase as Tokenizer

from flash_dmattn_hf.evaluation.final_states import evaluating
from flash_dmattn_hf.evaluation.prompts import Prompt
from flash_dmattn_hf.evaluation.scoring import Score, score_generated, score_teacher_forced
from flash_dmattn_hf.progress import progress_bar


class RecallCell(NamedTuple):
    """The prompts of one task, context and depth. All shares are from 0 to 1.

    depth: None for a task without, or for all depths together. num_prompts: how many were asked.
    tokens: mean share of the answers' tokens that are right, None when generated.
    answers: mean share of the answers with all their tokens right.
    all_right: share of the prompts with all answers right.
    """

    task: str
    context: int
    depth: int | None
    num_prompts: int
    tokens: float | None
    answers: float
    all_right: float


def recall(
    model: nn.Module,
    prompts: Sequence[Prompt],
    *,
    generate_with: Tokenizer | None = None,
    score: Callable[[nn.Module, Prompt], Score] = score_teacher_forced,
    progress: bool | str | None = None,
) -> list[RecallCell]:
    """Asks a model every prompt and returns one cell per task, context and depth, in the order of the prompts.

    prompts: from `recall_prompts`. One forward pass of batch 1 each, without a cache.
    generate_with: a tokenizer to have the answers generated greedily instead; None is teacher-forced.
    score: how a prompt is asked if it is not generated, such as a partial `score_compressed`.
    progress: label of a progress bar on a terminal; None draws none.
    """
    scores = {}
    with evaluating(model):
        for prompt in progress_bar(prompts, progress, unit="prompt"):
            if generate_with is None:
                found = score(model, prompt)
            else:
                found = score_generated(model, prompt, generate_with)
            scores.setdefault((prompt.task, prompt.context, prompt.depth), []).append(found)
    return [
        RecallCell(
            *where,
            num_prompts=len(found),
            tokens=None if generate_with is not None else _mean([score.tokens for score in found]),
            answers=_mean([score.answers for score in found]),
            all_right=_mean([score.all_right for score in found]),
        )
        for where, found in scores.items()
    ]


def over_depths(cells: Sequence[RecallCell]) -> list[RecallCell]:
    """Returns one cell per task and context: the mean over the prompts of all depths."""
    groups = {}
    for cell in cells:
        groups.setdefault((cell.task, cell.context), []).append(cell)
    return [
        RecallCell(
            *where,
            depth=None,
            num_prompts=sum(cell.num_prompts for cell in group),
            tokens=None if group[0].tokens is None else _mean_over(group, "tokens"),
            answers=_mean_over(group, "answers"),
            all_right=_mean_over(group, "all_right"),
        )
        for where, group in groups.items()
    ]


def _mean_over(cells: Sequence[RecallCell], name: str) -> float:
    return sum(getattr(cell, name) * cell.num_prompts for cell in cells) / sum(cell.num_prompts for cell in cells)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
