"""Perplexity is the mean loss of tokens that all see as much context."""

import pytest
import torch

from flash_dmattn_hf.evaluation.perplexity import cut, perplexity

from ..tiny import tiny_model, tokens


def test_perplexity_is_its_definition():
    model = tiny_model("llama", initializer_range=0.3)
    ids = tokens(1, 100)
    total = 0.0
    for stretch in ids[0, :90].view(3, 30):
        for position in range(20, 30):
            logits = model(stretch[None, 10:position]).logits[0, -1]
            total -= logits.log_softmax(-1)[stretch[position]].item()
    score = perplexity(model, ids, context_length=20, score_last=10, stretch_length=30)
    assert score.num_tokens == 30
    assert score.nll == pytest.approx(total / 30, abs=1e-5)
    assert score.perplexity == pytest.approx(torch.tensor(score.nll).exp().item(), rel=1e-5)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"context_length": 200}, "at least 200 tokens, got 100"),
        ({"context_length": 1}, "context_length must be from 2"),
        ({"context_length": 20, "score_last": 20}, "score_last must be from 1 to 19, got 20"),
        ({"context_length": 50, "stretch_length": 20}, "context_length must be from 2 to stretch_length 20, got 50"),
        ({"context_length": 20, "max_stretches": 0}, "max_stretches must be at least 1, got 0"),
    ],
)
def test_perplexity_names_what_is_wrong(options, message):
    with pytest.raises(ValueError, match=message):
        perplexity(tiny_model("llama"), tokens(1, 100), **options)


def test_a_part_of_the_stretches_is_spread_over_the_text():
    text = torch.arange(105)
    assert cut(text, 10)[:, 0].tolist() == list(range(0, 100, 10))
    assert cut(text, 10, 4)[:, 0].tolist() == [0, 20, 50, 70]
    assert cut(text, 10, 20).shape == (10, 10)
