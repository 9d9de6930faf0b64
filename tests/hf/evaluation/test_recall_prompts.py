"""Recall prompts are what docs/evaluation.md defines: exact lengths, depths, and answers that follow from the text."""

import re
from collections import Counter

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from flash_dmattn_hf.evaluation import TASKS, leading_tokens, recall_prompts

from .recall_text import CHARACTERS, TEXT, TOKENS

CONTEXT = 900


def prompts(**options):
    return recall_prompts(CHARACTERS, TOKENS, **{"contexts": [CONTEXT], "depths": [0, 50], "samples": 2, **options})


def before_answers(prompt) -> str:
    return CHARACTERS.decode(prompt.input_ids[: prompt.answer_start])


def solve_pass_key(text):
    return re.findall(r"# Important: the secret pass key is (\d+)\. Remember it: \1\.\n", text)


def solve_several_keys(text):
    name = re.search(r"The pass key of the (\w+) is $", text)[1]
    return re.findall(rf"# Important: the pass key of the {name} is (\d+)\.", text)


def solve_several_values(text):
    name = re.search(r"The numbers of the (\w+) are $", text)[1]
    return re.findall(rf"# Important: a number of the {name} is (\d+)\.", text)


def solve_variable_tracking(text):
    asked, values = re.search(r"have the value (\d+), in their order", text)[1], {}
    for name, source in re.findall(r"# Note: ([A-Z]{5}) = (\w+)\n", text):
        values[name] = values.get(source, source)
    return [name for name, value in values.items() if value == asked]


def solve_common_words(text):
    return [word for word, count in Counter(re.findall(r"# Word: (\w+)\n", text)).most_common() if count > 1]


SOLVERS = {name: globals()[f"solve_{name}"] for name in TASKS}


@pytest.mark.parametrize("task", TASKS)
def test_the_answers_follow_from_the_text(task):
    for prompt in prompts(tasks=[task], samples=10):
        assert SOLVERS[task](before_answers(prompt)) == list(prompt.answers)


@pytest.mark.parametrize("task", TASKS)
def test_spans_are_the_answers_and_the_length_is_exact(task):
    for prompt in prompts(tasks=[task], contexts=[CONTEXT, CONTEXT + 1]):
        assert prompt.input_ids.shape == (prompt.context,) and prompt.input_ids.dtype == torch.int64
        found = [CHARACTERS.decode(prompt.input_ids[first:last]) for first, last in prompt.spans]
        assert tuple(found) == prompt.answers
        assert prompt.spans[-1][1] == prompt.context
        end = CHARACTERS.decode(prompt.input_ids[prompt.answer_start :])
        assert end == ", ".join(prompt.answers)


@pytest.mark.parametrize("task", TASKS)
def test_the_rest_is_one_piece_of_the_users_text(task):
    written = r"\n# (?:Important|Note|Word): [^\n]*\n"
    for prompt in prompts(tasks=[task], samples=5):
        body = before_answers(prompt).rpartition("\n# Question: ")[0]
        rest = re.sub(written, "", body)
        assert rest in CHARACTERS.decode(TOKENS) and len(rest) > 100


@pytest.mark.parametrize("task", ["pass_key", "several_keys"])
@pytest.mark.parametrize("depth", [0, 1, 33, 50, 99, 100])
def test_the_depth_is_the_share_of_the_text_before_the_statement(task, depth):
    for prompt in prompts(tasks=[task], depths=[depth], samples=5):
        assert prompt.depth == depth
        text, written = before_answers(prompt), r"\n# Important: [^\n]*\n"
        body = text.rpartition("\n# Question: ")[0]
        answer = next(found for found in re.finditer(written, body) if prompt.answers[0] in found[0])
        before, whole = (len(re.sub(written, "", part)) for part in (body[: answer.start()], body))
        assert before == whole * depth // 100


def test_the_pass_key_is_the_one_of_the_quality_table():
    (prompt,) = prompts(tasks=["pass_key"], depths=[30], samples=1)
    (key,) = prompt.answers
    statement = f"\n# Important: the secret pass key is {key}. Remember it: {key}.\n"
    question = "\n# Question: what is the secret pass key? The secret pass key is "
    room = CONTEXT - len(statement) - len(question) - len(key)
    text = CHARACTERS.decode(prompt.input_ids)
    assert 10000 <= int(key) <= 99999
    assert text[room * 3 // 10 :].startswith(statement) and text.endswith(question + key)


def same(one, other):
    return all(torch.equal(a.input_ids, b.input_ids) and a.spans == b.spans for a, b in zip(one, other, strict=True))


def test_prompts_depend_on_the_seed_alone():
    assert same(prompts(seed=3), prompts(seed=3))
    assert not same(prompts(seed=3), prompts(seed=4))
    keys = [prompt.answers for prompt in prompts(tasks=["pass_key"], depths=[10, 20], samples=20)]
    assert len(set(keys)) == 40


def test_a_part_of_a_measurement_has_the_prompts_of_the_whole():
    whole = prompts(contexts=[CONTEXT, 1000], depths=[0, 50, 90])
    part = [prompt for prompt in whole if prompt.context == 1000 and prompt.task == "pass_key" and prompt.depth == 90]
    assert same(part, prompts(tasks=["pass_key"], contexts=[1000], depths=[90]))


def test_every_task_has_as_many_prompts():
    counts = Counter(prompt.task for prompt in prompts(depths=[0, 50, 90], samples=2))
    assert counts == dict.fromkeys(TASKS, 6)
    assert {prompt.depth for prompt in prompts(tasks=["common_words"])} == {None}


def with_leading_tokens(processor):
    backend = Tokenizer.from_str(CHARACTERS.backend_tokenizer.to_str())
    backend.post_processor = processor
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize("single, expected", [("<s> $A", [1]), ("<s> $A </s>", [1]), ("$A", []), ("$A </s>", [])])
def test_a_prompt_starts_as_the_tokenizer_starts_a_text(single, expected):
    special = [("<s>", 1), ("</s>", 2)]
    named = with_leading_tokens(processors.TemplateProcessing(single=single, special_tokens=special))
    assert leading_tokens(named) == expected
    for prompt in recall_prompts(named, TOKENS, contexts=[CONTEXT], depths=[0], samples=1):
        assert prompt.input_ids[: len(expected)].tolist() == expected and len(prompt.input_ids) == CONTEXT
        assert not set(prompt.input_ids[len(expected) :].tolist()) & {1, 2}


def test_tokens_of_several_characters_belong_to_the_answer_they_touch():
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator([TEXT, " 12345 23456 34567" * 50, " lantern basket" * 50], trainer)
    merged = PreTrainedTokenizerFast(tokenizer_object=backend)
    ids = torch.tensor(merged(TEXT)["input_ids"])
    longest = 0
    for prompt in recall_prompts(merged, ids, contexts=[700], depths=[50], samples=3):
        assert len(prompt.input_ids) == 700
        for answer, (first, last) in zip(prompt.answers, prompt.spans, strict=True):
            assert merged.decode(prompt.input_ids[first:last]).strip() == answer
            longest = max(longest, len(answer) - (last - first))
    assert longest > 0


@pytest.mark.parametrize(
    "options, message",
    [
        ({"tasks": ["pass_key", "keys"]}, "tasks must be among .*, got 'keys'"),
        ({"tasks": "pass_key"}, "tasks must be a sequence with at least one entry, got 'pass_key'"),
        ({"depths": []}, "depths must be a sequence with at least one entry"),
        ({"depths": [0, 101]}, "depths must be integers from 0 to 100, got 101"),
        ({"depths": [0.5]}, "depths must be integers from 0 to 100, got 0.5"),
        ({"samples": 0}, "samples must be an integer of at least 1, got 0"),
        ({"contexts": [10**6]}, "input_ids must hold at least 1000000 tokens, got"),
        ({"tasks": ["pass_key"], "contexts": [100]}, r"a context must have at least \d+ tokens for the task pass_key"),
    ],
)
def test_what_is_wrong_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        prompts(**options)


def test_the_shortest_context_is_named_rightly():
    options = {"tasks": ["pass_key"], "depths": [50], "samples": 1}
    with pytest.raises(ValueError) as error:
        prompts(**options, contexts=[100])
    least = int(re.search(r"at least (\d+) tokens", str(error.value))[1])
    assert prompts(**options, contexts=[least])
    with pytest.raises(ValueError, match=f"at least {least} tokens for the task pass_key, got {least - 1}"):
        prompts(**options, contexts=[least - 1])


def test_token_ids_of_a_batch_are_refused():
    with pytest.raises(ValueError, match=r"must have shape \(N,\) or \(1, N\), got \(2, 4\)"):
        recall_prompts(CHARACTERS, torch.zeros(2, 4, dtype=torch.long))


def test_a_tokenizer_without_offsets_is_refused():
    class Slow:
        is_fast = False

    with pytest.raises(ValueError, match="must be a fast one, which gives offsets, got Slow"):
        recall_prompts(Slow(), TOKENS, contexts=[CONTEXT])
