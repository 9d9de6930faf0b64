"""Scores of recall: an oracle gets everything, a random model nothing, and a real one what its logits say."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from flash_dmattn_hf.evaluation import TASKS, RecallCell, recall, recall_prompts
from flash_dmattn_hf.evaluation.recall import over_depths
from flash_dmattn_hf.evaluation.scoring import Score, score_generated, score_teacher_forced

from ..tiny import VOCAB_SIZE, tiny_model
from .recall_text import CHARACTERS, TOKENS


def prompts(**options):
    return recall_prompts(CHARACTERS, TOKENS, **{"contexts": [800], "depths": [20, 80], "samples": 2, **options})


class Fake(nn.Module):
    """Row t of its logits is `guess(input_ids)[t]`, one-hot; its output layer passes them on."""

    def __init__(self, guess):
        super().__init__()
        self.guess, self.head, self.embedding = guess, nn.Identity(), nn.Embedding(1, 1)

    def get_output_embeddings(self):
        return self.head

    def get_input_embeddings(self):
        return self.embedding

    def forward(self, input_ids, use_cache):
        return SimpleNamespace(logits=self.head(nn.functional.one_hot(self.guess(input_ids), VOCAB_SIZE).float()))


def next_token(input_ids):
    return input_ids.roll(-1, 1)


def random_token(input_ids):
    return torch.randint(0, VOCAB_SIZE, input_ids.shape, generator=torch.Generator().manual_seed(0))


def test_an_oracle_is_right_everywhere():
    cells = recall(Fake(next_token), prompts())
    assert {cell.task for cell in cells} == set(TASKS)
    assert all((cell.tokens, cell.answers, cell.all_right) == (1.0, 1.0, 1.0) for cell in cells)


def test_a_random_model_is_right_nowhere():
    cells = recall(Fake(random_token), prompts())
    assert all(cell.tokens < 0.15 and cell.answers == cell.all_right == 0 for cell in cells)


def test_a_token_late_is_wrong():
    cells = recall(Fake(lambda ids: ids), prompts(tasks=["pass_key"]))
    assert all(cell.all_right == 0 for cell in cells)


@pytest.mark.parametrize("task", TASKS)
def test_one_wrong_token_costs_its_answer(task):
    prompt = prompts(tasks=[task], samples=1)[0]
    wrong = prompt.spans[0][1] - 1

    def all_but_one(input_ids):
        guesses = next_token(input_ids)
        guesses[:, wrong - 1] = 0
        return guesses

    score = score_teacher_forced(Fake(all_but_one), prompt)
    num_tokens, num_answers = sum(last - first for first, last in prompt.spans), len(prompt.spans)
    assert score.tokens == pytest.approx(1 - 1 / num_tokens)
    assert score.answers == pytest.approx(1 - 1 / num_answers) and not score.all_right


def test_separators_do_not_count():
    prompt = prompts(tasks=["several_values"], samples=1)[0]

    def no_separators(input_ids):
        guesses = next_token(input_ids)
        for (_, last), (first, _) in zip(prompt.spans, prompt.spans[1:], strict=False):
            guesses[:, last - 1 : first - 1] = 0
        return guesses

    assert score_teacher_forced(Fake(no_separators), prompt) == Score(1.0, 1.0)


@torch.no_grad()
@pytest.mark.parametrize("model_type", ["llama", "gemma2"])
def test_a_real_model_scores_what_its_logits_say(model_type):
    model = tiny_model(model_type, initializer_range=0.3, max_position_embeddings=1024).double().train()
    asked = prompts(samples=1)
    cells = recall(model, asked)
    assert model.training
    model.eval()
    for prompt, cell in zip(merge(asked), cells, strict=True):
        shares = []
        for one in prompt:
            guesses = model(one.input_ids[None]).logits[0].argmax(-1)
            positions = [position for first, last in one.spans for position in range(first, last)]
            right = [guesses[position - 1] == one.input_ids[position] for position in positions]
            shares.append(sum(right) / len(right))
        assert cell.tokens == pytest.approx(float(sum(shares) / len(shares)))


def merge(asked):
    """The prompts of each cell, in order."""
    groups = {}
    for prompt in asked:
        groups.setdefault((prompt.task, prompt.context, prompt.depth), []).append(prompt)
    return list(groups.values())


def test_cells_are_per_task_context_and_depth():
    cells = recall(Fake(next_token), prompts(tasks=["pass_key", "common_words"], contexts=[700, 800]))
    found = [(cell.task, cell.context, cell.depth, cell.num_prompts) for cell in cells]
    assert found == [
        ("pass_key", 700, 20, 2),
        ("pass_key", 700, 80, 2),
        ("pass_key", 800, 20, 2),
        ("pass_key", 800, 80, 2),
        ("common_words", 700, None, 4),
        ("common_words", 800, None, 4),
    ]


def test_depths_together_are_the_mean_over_prompts():
    cells = [RecallCell("pass_key", 700, 0, 1, 0.5, 0.0, 0.0), RecallCell("pass_key", 700, 50, 3, 0.9, 1.0, 1.0)]
    (merged,) = over_depths(cells)
    assert merged == RecallCell("pass_key", 700, None, 4, pytest.approx(0.8), 0.75, 0.75)
    (generated,) = over_depths([cell._replace(tokens=None) for cell in cells])
    assert generated.tokens is None and generated.answers == 0.75


class Speaker(Fake):
    """Generates one text, cut to the allowed length, whatever the prompt."""

    def __init__(self, text):
        super().__init__(next_token)
        self.text = text

    def generate(self, input_ids, max_new_tokens, **options):
        assert options["do_sample"] is False
        new = CHARACTERS(self.text, add_special_tokens=False, return_tensors="pt")["input_ids"][:, :max_new_tokens]
        return torch.cat([input_ids, new], 1)


@pytest.mark.parametrize(
    "say, share",
    [
        (", ".join, 1.0),
        (lambda answers: " ".join(reversed(answers)) + "!", 1.0),
        (lambda answers: answers[0], 0.25),
        (lambda answers: "1" + answers[0], 0.0),
        (lambda answers: " and ".join(answers[1:]), 0.75),
        (lambda answers: " " * 100 + answers[0], 0.0),
    ],
    ids=["as expected", "other order", "one", "inside a longer number", "three", "too late"],
)
def test_generated_answers_are_looked_for_in_the_text(say, share):
    prompt = prompts(tasks=["several_values"], samples=1)[0]
    score = score_generated(Speaker(say(prompt.answers)), prompt, CHARACTERS)
    assert score == Score(None, share) and score.all_right == (share == 1.0)


def test_generated_cells_have_no_share_of_tokens():
    asked = prompts(tasks=["pass_key"], samples=1)[:1]
    (cell,) = recall(Speaker(asked[0].answers[0]), asked, generate_with=CHARACTERS)
    assert cell == RecallCell("pass_key", 800, 20, 1, None, 1.0, 1.0)


def test_generation_goes_on_from_the_question():
    model = tiny_model("llama", initializer_range=0.3, eos_token_id=None, max_position_embeddings=1024)
    prompt = prompts(tasks=["pass_key"], samples=1)[0]
    question = prompt.input_ids[None, : prompt.answer_start]
    expected = model.generate(question, max_new_tokens=13, do_sample=False)[0, prompt.answer_start :]
    asked = prompt._replace(answers=(CHARACTERS.decode(expected),))
    found = score_generated(model, asked, CHARACTERS)
    assert found.answers == 1.0
