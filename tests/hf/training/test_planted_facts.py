"""Planted facts: what is told is asked for, at every depth, and nothing overlaps."""

from random import Random

import pytest
import torch

from flash_dmattn_hf.training import planted_facts
from flash_dmattn_hf.training.far_reuse import FACT_SHARE, FarReuse
from flash_dmattn_hf.training.planted_facts import MOST_TOKENS, NUM_FACTS, draw_facts, random_values

TEXT = torch.arange(1000, 21000)
VALUES = [[number, number + 100] for number in range(1, 90)]


class Letters:
    """A tokenizer with one token for each character."""

    def __call__(self, texts, add_special_tokens):
        assert not add_special_tokens
        return {"input_ids": [[ord(letter) for letter in text] for text in texts]}


@pytest.mark.parametrize("length", [512, 4096])
@pytest.mark.parametrize("first", [0, 4])
def test_where_facts_are_told_and_asked_for(length, first):
    depths, distances, counts = [], [], set()
    for seed in range(200):
        facts = draw_facts(Random(seed), TEXT, VALUES, length, first)
        assert 1 <= len(facts) <= NUM_FACTS[1]
        counts.add(len(facts))
        asked_from, taken = length - sum(len(fact.tokens) for fact in facts), []
        for fact in facts:
            size = len(fact.tokens)
            assert first <= fact.source and fact.source + size <= asked_from <= fact.target
            taken += [range(fact.source, fact.source + size), range(fact.target, fact.target + size)]
            depths.append(fact.source / asked_from)
            distances.append((fact.target - fact.source) / length)
        assert len(set().union(*taken)) == sum(map(len, taken))
        assert max(part.stop for part in taken) == length
    assert sum(depth < 0.1 for depth in depths) > len(depths) * 0.05
    assert sum(depth > 0.9 for depth in depths) > len(depths) * 0.05
    assert sum(distance < 0.1 for distance in distances) > len(distances) * 0.02
    if length == 4096:
        assert counts == set(range(NUM_FACTS[0], NUM_FACTS[1] + 1))


def test_facts_without_room_are_left_out():
    found = [draw_facts(Random(seed), TEXT, VALUES, 64) for seed in range(200)]
    for facts in found:
        asked = sum(len(fact.tokens) for fact in facts)
        assert asked <= 64 * planted_facts.MOST_ASKED
        assert all(fact.source + len(fact.tokens) <= 64 - asked <= fact.target for fact in facts)
    assert any(found) and len(max(found, key=len)) < NUM_FACTS[1]


def test_half_of_the_stretches_share_a_phrase_and_differ_by_a_name():
    shares = []
    for seed in range(200):
        cues = [fact.cue.tolist() for fact in draw_facts(Random(seed), TEXT, VALUES, 4096)]
        names = [cue[-2:] for cue in cues]
        is_shared = all(cue[:-2] == cues[0][:-2] for cue in cues)
        assert not is_shared or (all(name in VALUES for name in names) and len(set(map(tuple, names))) == len(names))
        shares.append(is_shared)
    assert abs(sum(shares) / len(shares) - planted_facts.SHARED_SHARE) < 0.12


def test_an_example_tells_and_asks(monkeypatch):
    monkeypatch.setattr(planted_facts, "SHARED_SHARE", 0.0)  # names would look like answers
    data = FarReuse(TEXT, length=1024, count=600, values=VALUES, answer_weight=7.0)
    planted = 0
    for example in data:
        tokens, weights = example["input_ids"].tolist(), example["token_weights"]
        answers = [position for position, token in enumerate(tokens) if token < 100]
        if not answers:
            continue
        planted += 1
        told, asked = answers[: len(answers) // 2], answers[len(answers) // 2 :]
        assert len(told) == len(asked) >= 1
        for answer in asked:
            value = tokens[answer : answer + 2]
            assert any(tokens[place - 4 : place + 2] == tokens[answer - 4 : answer] + value for place in told)
            assert (weights[answer - 1 : answer + 1] == 7.0).all()  # of the tokens that predict the value
        assert (weights != 1).sum() == 2 * len(asked)
    assert abs(planted / 600 - FACT_SHARE) < 0.06


def test_without_values_nothing_is_planted():
    assert all((example["input_ids"] >= 1000).all() for example in FarReuse(TEXT, length=256, count=50))


def test_values_are_those_of_the_seed_and_of_many_kinds():
    values = random_values(Letters(), count=500)
    assert values == random_values(Letters(), count=500) != random_values(Letters(), count=500, seed=1)
    texts = ["".join(map(chr, value)).strip() for value in values]
    assert len(set(texts)) > 450 and max(map(len, values)) <= MOST_TOKENS
    kinds = [str.isdigit, str.isupper, lambda text: "_" in text, lambda text: "." in text]
    assert all(sum(map(kind, texts)) > 50 for kind in kinds)
