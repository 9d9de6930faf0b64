"""What far reuse repeats: lengths, places, weights and rates, and that it depends on seed and index alone."""

from random import Random

import pytest
import torch
from torch.utils.data import DataLoader

from flash_dmattn_hf.training.far_reuse import (
    NUM_SHORT_SPANS,
    REUSE_SHARE,
    SHORT_SPAN_LENGTHS,
    SPAN_LENGTHS,
    SPAN_WEIGHT,
    FarReuse,
    draw_copies,
)

TEXT = torch.arange(1000, 21000)
"""Every token once, so that a token says where it came from."""


def examples(length=1024, count=600, **values):
    return FarReuse(TEXT, length=length, count=count, **values)


def copied(tokens, start):
    """The rows of a stretch whose token is not the one of the text at this place."""
    return (tokens != torch.arange(start, start + len(tokens))).nonzero().flatten().tolist()


@pytest.mark.parametrize("length", [64, 100, 512, 4096])
@pytest.mark.parametrize("first", [0, 1, 4])
def test_where_copies_come_from_and_go(length, first):
    half = length // 2
    for seed in range(300):
        span, *short = draw_copies(Random(seed), length, first)
        assert first <= span.source and span.source + span.length <= half
        assert span.target + span.length == length and 1 <= span.length <= length // 8
        assert len(short) == NUM_SHORT_SPANS
        end = half
        for copy in short:
            assert 1 <= copy.length <= max(SHORT_SPAN_LENGTHS)
            assert end <= copy.target and copy.target + copy.length <= span.target
            assert first <= copy.source and copy.target - (copy.source + copy.length) >= length // 3
            end = copy.target + copy.length


def test_all_lengths_are_drawn_where_they_fit():
    drawn = [draw_copies(Random(seed), 4096) for seed in range(300)]
    assert {copies[0].length for copies in drawn} == set(SPAN_LENGTHS)
    assert {copy.length for copies in drawn for copy in copies[1:]} == set(SHORT_SPAN_LENGTHS)
    assert {draw_copies(Random(seed), 1024)[0].length for seed in range(300)} == {64, 128}


def test_an_example_is_a_stretch_of_the_text_with_its_copies():
    num_reused = 0
    for example in examples():
        tokens, weights = example["input_ids"], example["token_weights"]
        assert tokens.shape == weights.shape == (1024,)
        assert tokens.dtype == torch.int64 and weights.dtype == torch.float32
        rows = copied(tokens, int(tokens[0]))
        if not rows:
            assert (weights == 1).all()
            continue
        num_reused += 1
        assert min(rows) >= 512 and rows[-1] == 1023
        sources = tokens - tokens[0]  # the row that a token comes from
        assert all(0 <= int(sources[row]) < row for row in rows)
        heavy = (weights != 1).nonzero().flatten()
        assert (weights[heavy] == SPAN_WEIGHT).all() and heavy.tolist() == list(range(int(heavy[0]), 1023))
        predicted = heavy + 1
        assert len(heavy) in (64, 128) and int(predicted[0]) in rows
        assert sources[predicted].max() < 512 and (sources[predicted].diff() == 1).all()
    assert abs(num_reused / 600 - REUSE_SHARE) < 0.06


def test_stretches_come_from_the_whole_text():
    starts = torch.stack([example["input_ids"][0] for example in examples()]) - 1000
    assert starts.min() < 500 and starts.max() > len(TEXT) - 1024 - 500


def test_the_last_stretch_can_be_drawn():
    assert torch.equal(FarReuse(TEXT[:64], length=64, count=9)[0]["input_ids"][:32], TEXT[:32])


def test_special_tokens_stay_in_front_and_are_not_repeated():
    for example in examples(leading=(7, 8)):
        tokens = example["input_ids"]
        assert tokens[:2].tolist() == [7, 8] and (tokens[2:] >= 1000).all() and len(tokens) == 1024


def test_an_example_depends_on_seed_and_index_alone():
    first, again = examples(), examples()
    backwards = {index: again[index] for index in reversed(range(40))}
    loaded = DataLoader(examples(count=40), batch_size=4, num_workers=2)
    loaded = [row for batch in loaded for row in zip(batch["input_ids"], batch["token_weights"], strict=True)]
    for index in range(40):
        for tokens, weights in (backwards[index].values(), loaded[index]):
            assert torch.equal(tokens, first[index]["input_ids"])
            assert torch.equal(weights, first[index]["token_weights"])
    others = examples(seed=1)
    assert not any(torch.equal(others[i]["input_ids"], first[i]["input_ids"]) for i in range(40))


def test_it_ends():
    with pytest.raises(IndexError, match="from 0 to 599, got 600"):
        examples()[600]
    assert len(list(examples(count=5))) == len(examples(count=5)) == 5


WRONG = {
    "short text": (TEXT[:63], {}, "input_ids must hold at least length = 64 tokens, got 63"),
    "batch": (TEXT[None], {}, "input_ids must be integers of shape"),
    "floats": (TEXT.float(), {}, "input_ids must be integers of shape"),
    "length": (TEXT, {"length": 63}, "length must be an integer of at least 64, got 63"),
    "count": (TEXT, {"count": 0}, "count must be an integer of at least 1, got 0"),
    "answer_weight": (TEXT, {"answer_weight": 0.0}, "answer_weight must be above 0, got 0.0"),
    "leading": (TEXT, {"leading": (1,) * 9}, "leading must have at most 4 tokens, got 9"),
}


@pytest.mark.parametrize(("text", "values", "sentence"), WRONG.values(), ids=WRONG.keys())
def test_what_does_not_fit_is_refused(text, values, sentence):
    with pytest.raises(ValueError, match=sentence):
        FarReuse(text, **{"length": 64, "count": 4, **values})
