"""Recall prompts: the statements and the question of a task put into the user's own text, token by token."""

from collections.abc import Sequence
from random import Random
from typing import NamedTuple

import torch
from transformers import PreTrainedTokenizerBase as Tokenizer

from flash_dmattn_hf.evaluation.tasks import TASKS, Case

CONTEXTS = (1024, 2048, 4096)
DEPTHS = tuple(range(0, 100, 10))
SAMPLES = 4


class Prompt(NamedTuple):
    """One prompt, its answers included.

    context: tokens. depth: per cent of the text before the statement that is asked for; None for a task without.
    input_ids: (context,) int64; the last token is the last of the answers.
    answers: the expected texts. spans: of each answer, the positions of its tokens in input_ids, [start, end).
    question_start: position of the first token of the question.
    """

    task: str
    context: int
    depth: int | None
    input_ids: torch.Tensor
    answers: tuple[str, ...]
    spans: tuple[tuple[int, int], ...]
    question_start: int

    @property
    def answer_start(self) -> int:
        """Position of the first token of the answers."""
        return self.spans[0][0]


def recall_prompts(
    tokenizer: Tokenizer,
    input_ids: torch.Tensor,
    *,
    tasks: Sequence[str] = tuple(TASKS),
    contexts: Sequence[int] = CONTEXTS,
    depths: Sequence[int] = DEPTHS,
    samples: int = SAMPLES,
    seed: int = 0,
) -> list[Prompt]:
    """Builds the prompts of a recall measurement: per task and context, `samples` for each depth.

    A task without a depth gets as many prompts as one with. A prompt depends on the text, its task, context, depth
    and number, and `seed`: a part of a measurement has the prompts of the whole.

    tokenizer: a fast one, because the tokens of an answer are found by their offsets.
    input_ids: (N,) or (1, N) integer token ids of the text around the statements, without special tokens.
    contexts: tokens of a prompt, answers included. depths: integers from 0 to 100.
    Raises ValueError for unknown tasks, arguments out of range, a text shorter than the longest context, a context
    that does not hold a task's own sentences, or a tokenizer without offsets.
    """
    input_ids = input_ids[0] if input_ids.dim() == 2 and input_ids.shape[0] == 1 else input_ids
    _check(input_ids, tasks, contexts, depths, samples)
    if not tokenizer.is_fast:
        raise ValueError(f"tokenizer must be a fast one, which gives offsets, got {type(tokenizer).__name__}")
    text, leading = input_ids.tolist(), leading_tokens(tokenizer)
    prompts = []
    for name in tasks:
        for context in contexts:
            for depth in depths:
                for sample in range(samples):
                    rng = Random(f"{seed} {name} {context} {depth} {sample}")
                    case = TASKS[name].write(rng)
                    asked = depth if TASKS[name].has_depth else None
                    ids, spans, question = _assemble(tokenizer, text, leading, case, rng, name, context, asked)
                    prompts.append(Prompt(name, context, asked, torch.tensor(ids), case.answers, spans, question))
    return prompts


def leading_tokens(tokenizer: Tokenizer) -> list[int]:
    """Returns the special tokens that the tokenizer puts before a text, often one or none."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    starts = range(len(whole) - len(plain) + 1)
    return whole[: next((start for start in starts if whole[start : start + len(plain)] == plain), 0)]


def _assemble(tokenizer, text, leading, case: Case, rng: Random, name: str, context: int, depth: int | None):
    """Returns the token ids, exactly `context` of them, the spans of the answers, and the question's start."""
    statements = [tokenizer(statement, add_special_tokens=False)["input_ids"] for statement in case.statements]
    end, spans = _question_and_answers(tokenizer, case)
    own = len(leading) + sum(map(len, statements)) + len(end)
    room = context - own
    if room < 1:
        raise ValueError(f"a context must have at least {own + 1} tokens for the task {name}, got {context}")
    start = rng.randrange(len(text) - room + 1)
    filler = text[start : start + room]

    places = [rng.randrange(room + 1) for _ in statements]
    if depth is None:
        places.sort()
    else:
        places[0] = room * depth // 100
    ids, done = list(leading), 0
    for place, statement in sorted(zip(places, statements, strict=True), key=lambda pair: pair[0]):
        ids += filler[done:place] + statement
        done = place
    ids += filler[done:]
    spans = tuple((len(ids) + first, len(ids) + last) for first, last in spans)
    return ids + end, spans, len(ids)


def _question_and_answers(tokenizer, case: Case) -> tuple[list[int], list[tuple[int, int]]]:
    """Tokenizes the end of a prompt as one text; a token that holds a character of an answer belongs to it."""
    end = case.question + ", ".join(case.answers)
    encoded = tokenizer(end, add_special_tokens=False, return_offsets_mapping=True)
    spans, first = [], len(case.question)
    for answer in case.answers:
        last = first + len(answer)
        inside = [i for i, (a, b) in enumerate(encoded["offset_mapping"]) if max(a, first) < min(b, last)]
        if not inside:
            raise ValueError(f"tokenizer must give offsets into the text, got none for the answer {answer!r}")
        spans.append((inside[0], inside[-1] + 1))
        first = last + len(", ")
    return encoded["input_ids"][: spans[-1][1]], spans


def _check(input_ids, tasks, contexts, depths, samples) -> None:
    if input_ids.dim() != 1:
        raise ValueError(f"input_ids must have shape (N,) or (1, N), got {tuple(input_ids.shape)}")
    for name, values in (("tasks", tasks), ("contexts", contexts), ("depths", depths)):
        if isinstance(values, str) or not values:
            raise ValueError(f"{name} must be a sequence with at least one entry, got {values!r}")
    if unknown := [name for name in tasks if name not in TASKS]:
        raise ValueError(f"tasks must be among {list(TASKS)}, got {unknown[0]!r}")
    if wrong := [depth for depth in depths if type(depth) is not int or not 0 <= depth <= 100]:
        raise ValueError(f"depths must be integers from 0 to 100, got {wrong[0]!r}")
    if type(samples) is not int or samples < 1:
        raise ValueError(f"samples must be an integer of at least 1, got {samples!r}")
    if len(input_ids) < max(contexts):
        raise ValueError(f"input_ids must hold at least {max(contexts)} tokens, got {len(input_ids)}")
