"""Facts planted in training data: what nobody can guess, told somewhere in a stretch and asked for at its end.

A fact is a cue and a value. The cue is a few tokens of the text, from elsewhere, and the value is a short string drawn
at random, such as a number. Both are written over the stretch somewhere. Near its end the cue appears again and the
value follows, so that a key which was dropped in between costs the whole surprise of the value. In half of the
stretches all facts share one phrase and differ by a name, another such string, so that the phrase does not say which
value is meant. Repeated text (`training.far_reuse`) teaches to keep phrases that can be read again; this teaches to
keep single names and numbers.
"""

import string
from collections.abc import Sequence
from random import Random
from typing import NamedTuple

import torch
from transformers import PreTrainedTokenizerBase as Tokenizer

NUM_VALUES = 4096
NUM_FACTS = (2, 12)
CUE_LENGTHS = (4, 16)
SHARED_SHARE = 1 / 2
"""Of the stretches, those whose facts share a phrase."""
MOST_TOKENS = 16
"""Tokens of a value at most; longer ones are cut."""
MOST_ASKED = 1 / 4
"""What the questions of a stretch may take of its length."""


class Fact(NamedTuple):
    """Token ids cue + value stand in a stretch from `source` on, and again from `target` on."""

    cue: torch.Tensor
    value: torch.Tensor
    source: int
    target: int

    @property
    def tokens(self) -> torch.Tensor:
        return torch.cat([self.cue, self.value])


def random_values(tokenizer: Tokenizer, *, count: int = NUM_VALUES, seed: int = 0) -> list[list[int]]:
    """Returns token ids of `count` random strings: integers, decimals, hexadecimals, capitals, and identifiers.

    The same for the same tokenizer, count and seed.
    """
    rng = Random(f"values {seed}")
    texts = [rng.choice(("", " ")) + rng.choice(_KINDS)(rng) for _ in range(count)]
    return [ids[:MOST_TOKENS] for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]


_KINDS = (
    lambda rng: "".join(rng.choices(string.digits, k=rng.randint(3, 8))),
    lambda rng: f"{rng.randrange(1000)}.{rng.randrange(1000)}",
    lambda rng: "".join(rng.choices("0123456789abcdef", k=rng.randint(6, 12))),
    lambda rng: "".join(rng.choices(string.ascii_uppercase, k=rng.randint(3, 6))),
    lambda rng: "_".join("".join(rng.choices(string.ascii_lowercase, k=rng.randint(3, 6))) for _ in range(2)),
)


def draw_facts(
    rng: Random, input_ids: torch.Tensor, values: Sequence[Sequence[int]], length: int, first: int = 0
) -> list[Fact]:
    """Draws the facts of a stretch of `length` tokens, the first `first` of them special.

    Facts never overlap. They are asked for one after the other, the last value at the very end, and told anywhere
    before that, each in an equal part of it, in another order. So facts of every depth are asked for, some of them soon
    after they were told. Facts for which a short stretch has no room are left out.

    input_ids: (N,) token ids of the text, for the cues. values: token ids of each value.
    """
    texts, count = [], rng.randint(*NUM_FACTS)
    shared = _phrase(rng, input_ids) if rng.random() < SHARED_SHARE and len(values) >= count else None
    for name in rng.sample(values, count) if shared is not None else [None] * count:
        cue = _phrase(rng, input_ids) if name is None else torch.cat([shared, torch.tensor(name)])
        texts.append((cue, torch.tensor(rng.choice(values), dtype=torch.long)))
    while texts:
        sizes = [len(cue) + len(value) for cue, value in texts]
        room = (length - sum(sizes) - first) // len(texts)
        if sum(sizes) <= length * MOST_ASKED and max(sizes) <= room:
            break
        texts.pop()

    facts, end = [], length
    for part, (cue, value) in zip(rng.sample(range(len(texts)), len(texts)), texts, strict=True):
        size = len(cue) + len(value)
        target = end - size
        source = first + part * room + rng.randrange(room - size + 1)
        facts.append(Fact(cue, value, source, target))
        end = target
    return facts


def _phrase(rng: Random, input_ids: torch.Tensor) -> torch.Tensor:
    size = rng.randint(*CUE_LENGTHS)
    start = rng.randrange(len(input_ids) - size + 1)
    return input_ids[start : start + size].long()
