"""Which answers of a recall prompt a model gets right."""

import re
from typing import NamedTuple

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase as Tokenizer

from flash_dmattn_hf.evaluation.final_states import logits_of_rows
from flash_dmattn_hf.evaluation.prompts import Prompt

SPARE_TOKENS = 8
"""Tokens that a generated answer may be longer than the expected one."""


class Score(NamedTuple):
    """tokens: share of the answers' tokens that are right, None when generated. answers: share of the answers."""

    tokens: float | None
    answers: float

    @property
    def all_right(self) -> bool:
        return self.answers == 1.0


def score_teacher_forced(model: nn.Module, prompt: Prompt) -> Score:
    """One forward pass: a token is right if it is the likeliest one after all tokens before it.

    Separators between answers do not count.
    """
    positions = answer_positions(prompt)
    guesses = logits_of_rows(model, prompt.input_ids, positions - 1).argmax(-1).cpu()
    return score_guesses(prompt, positions, guesses)


def score_guesses(prompt: Prompt, positions: torch.Tensor, guesses: torch.Tensor) -> Score:
    """Compares the likeliest tokens (R,) with the answers' tokens at `positions` (R,), those of all spans in order."""
    right = guesses == prompt.input_ids[positions]
    answers = [bool(part.all()) for part in right.split([last - first for first, last in prompt.spans])]
    return Score(right.double().mean().item(), sum(answers) / len(answers))


def answer_positions(prompt: Prompt) -> torch.Tensor:
    """Returns the positions (R,) of the answers' tokens, separators left out."""
    return torch.tensor([position for span in prompt.spans for position in range(*span)])


def score_generated(model: nn.Module, prompt: Prompt, tokenizer: Tokenizer) -> Score:
    """Greedy generation after the question: an answer is right if it is in the text, as a word of its own."""
    question = prompt.input_ids[None, : prompt.answer_start].to(model.get_input_embeddings().weight.device)
    padding = next((t for t in (tokenizer.pad_token_id, tokenizer.eos_token_id) if t is not None), 0)
    ids = model.generate(
        question,
        attention_mask=torch.ones_like(question),
        max_new_tokens=prompt.context - prompt.answer_start + SPARE_TOKENS,
        do_sample=False,
        num_beams=1,
        pad_token_id=padding,
    )
    text = tokenizer.decode(ids[0, prompt.answer_start :], skip_special_tokens=True)
    found = [re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", text) is not None for answer in prompt.answers]
    return Score(None, sum(found) / len(found))
