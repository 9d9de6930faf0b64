"""Training data with far reuse: running text, some of it with something from far back needed again at its end.

Running text alone gives keys that are far away almost no gradient, because the newest few hundred tokens predict most
of what follows. A repeated span, or a fact that is asked for, can only be predicted from its first appearance.
"""

import math
from collections.abc import Sequence
from random import Random
from typing import NamedTuple

import torch
from torch.utils.data import Dataset

from flash_dmattn_hf.training.planted_facts import draw_facts

REUSE_SHARE = 0.35
FACT_SHARE = 0.25
"""Of the stretches, where there are values to plant."""
SPAN_LENGTHS = (64, 128, 256, 512)
"""Tokens of the span that is repeated at the end; at most an eighth of the stretch."""
SPAN_WEIGHT = 4.0
"""Of the tokens of the span that is repeated at the end; the rest of the text has 1."""
ANSWER_WEIGHT = 32.0
"""Of the values that are asked for, unless the caller says otherwise. They are few: some forty tokens of a stretch."""
SHORT_SPAN_LENGTHS = (8, 16, 32)
"""Tokens of the spans repeated in between; at most a sixteenth of the stretch."""
NUM_SHORT_SPANS = 3


class Copy(NamedTuple):
    """Tokens source to source + length - 1 of a stretch appear again from `target` on."""

    source: int
    target: int
    length: int


class FarReuse(Dataset):
    """Stretches of a text, some of which need what is far back; the same for the same seed and index, anywhere.

    `REUSE_SHARE` of them repeat spans. Where there are values, `FACT_SHARE` tell facts and ask for them.

    An example depends on the text, `length`, `leading`, `seed` and its index alone: not on the worker that makes it,
    nor on the examples made before. So a resumed run sees the data of an uninterrupted one.

    input_ids: (N,) integer token ids of the text, without special tokens, at least `length` of them.
    length: tokens of a stretch, at least 64. count: stretches. leading: special token ids in front of every stretch.
    values: token ids of each value that a fact may have, as from `random_values`. answer_weight: of the values that
    are asked for.

    An example has input_ids (length,) int64 and token_weights (length,) float32, of what each token predicts, which is
    the next one: `SPAN_WEIGHT` for the span that is repeated at the end, answer_weight for the values of facts where
    they are asked for, 1 elsewhere. Raises ValueError for arguments out of range.
    """

    def __init__(
        self,
        input_ids: torch.Tensor,
        *,
        length: int,
        count: int,
        seed: int = 0,
        leading: Sequence[int] = (),
        values: Sequence[Sequence[int]] = (),
        answer_weight: float = ANSWER_WEIGHT,
    ) -> None:
        if input_ids.dim() != 1 or input_ids.is_floating_point():
            shape = tuple(input_ids.shape)
            raise ValueError(f"input_ids must be integers of shape (N,), got {input_ids.dtype} of shape {shape}")
        for name, number, smallest in (("length", length, 64), ("count", count, 1)):
            if type(number) is not int or number < smallest:
                raise ValueError(f"{name} must be an integer of at least {smallest}, got {number!r}")
        if not 0 < answer_weight < math.inf:
            raise ValueError(f"answer_weight must be above 0, got {answer_weight!r}")
        if len(leading) > length // 16:
            raise ValueError(f"leading must have at most {length // 16} tokens, got {len(leading)}")
        if len(input_ids) < length:
            raise ValueError(f"input_ids must hold at least length = {length} tokens, got {len(input_ids)}")
        self.input_ids = input_ids
        self.length = length
        self.count = count
        self.seed = seed
        self.leading = torch.tensor(list(leading), dtype=torch.long)
        self.values = values
        self.answer_weight = answer_weight

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """Returns the example of an index. Raises IndexError beyond the last."""
        if not 0 <= index < self.count:
            raise IndexError(f"index must be from 0 to {self.count - 1}, got {index}")
        rng = Random(f"{self.seed} {index}")
        taken = self.length - len(self.leading)
        start = rng.randrange(len(self.input_ids) - taken + 1)
        tokens = torch.cat([self.leading, self.input_ids[start : start + taken].long()])
        weights = torch.ones(self.length)
        kind = rng.random()
        if kind < REUSE_SHARE:
            copies = draw_copies(rng, self.length, len(self.leading))
            original = tokens.clone()
            for source, target, length in copies:
                tokens[target : target + length] = original[source : source + length]
            weights[copies[0].target - 1 : -1] = SPAN_WEIGHT
        elif self.values and kind < REUSE_SHARE + FACT_SHARE:
            for fact in draw_facts(rng, self.input_ids, self.values, self.length, len(self.leading)):
                for start in (fact.source, fact.target):
                    tokens[start : start + len(fact.tokens)] = fact.tokens
                answer = fact.target + len(fact.cue)
                weights[answer - 1 : answer + len(fact.value) - 1] = self.answer_weight
        return {"input_ids": tokens, "token_weights": weights}


def draw_copies(rng: Random, length: int, first: int = 0) -> list[Copy]:
    """Draws what a stretch of `length` tokens, the first `first` of them special, repeats.

    The first copy is a span of the first half that ends the stretch. The others are short spans that appear again
    between the middle and that, at least a third of the stretch after their source; they never overlap.
    """
    half, span = length // 2, min(rng.choice(SPAN_LENGTHS), length // 8)
    copies = [Copy(rng.randrange(first, half - span + 1), length - span, span)]
    room = (length - span - half) // NUM_SHORT_SPANS
    for number in range(NUM_SHORT_SPANS):
        short = min(rng.choice(SHORT_SPAN_LENGTHS), room, length // 16)
        earliest = half + number * room
        target = rng.randrange(earliest, earliest + room - short + 1)
        copies.append(Copy(rng.randrange(first, target - length // 3 - short + 1), target, short))
    return copies
