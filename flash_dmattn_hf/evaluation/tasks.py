"""The recall tasks as text: what is hidden in a text, what is asked at its end, what the answers are."""

import string
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import NamedTuple

NUM_KEYS = 4
NUM_VALUES = 4
NUM_CHAINS, CHAIN_LENGTH = 2, 4
COMMON_COUNTS, NUM_RARE = (9, 6, 3), 12
"""How often the asked words of `common_words` are in the text, and how many other words are in it once."""

WORDS = (
    "anchor apple basket bridge candle carpet castle circle copper cotton desert dragon engine feather finger forest "
    "garden guitar hammer harbor island jacket kettle ladder lantern lemon marble meadow mirror monkey needle ocean "
    "orange palace pencil pepper pigeon pillow planet pocket rabbit ribbon rocket saddle shadow silver spider summer "
    "temple thunder ticket timber tunnel turtle valley velvet violin walnut window winter"
).split()


class Case(NamedTuple):
    """One instance of a task.

    statements: sentences to hide; with a depth the first one is what is asked for.
    question: the end of the prompt, up to where the answers begin.
    answers: what has to follow, separated by ", ".
    """

    statements: tuple[str, ...]
    question: str
    answers: tuple[str, ...]


@dataclass(frozen=True)
class Task:
    """write: makes a case from a random generator. has_depth: whether one statement is asked for, at a chosen depth;
    otherwise all statements are needed and stand at random places, in their order."""

    name: str
    write: Callable[[Random], Case]
    has_depth: bool


def _pass_key(rng: Random) -> Case:
    (key,) = _numbers(rng, 1)
    statement = f"\n# Important: the secret pass key is {key}. Remember it: {key}.\n"
    return Case((statement,), "\n# Question: what is the secret pass key? The secret pass key is ", (key,))


def _several_keys(rng: Random) -> Case:
    names, keys = rng.sample(WORDS, NUM_KEYS), _numbers(rng, NUM_KEYS)
    statements = tuple(
        f"\n# Important: the pass key of the {name} is {key}. Remember it: {key}.\n"
        for name, key in zip(names, keys, strict=True)
    )
    question = f"\n# Question: what is the pass key of the {names[0]}? The pass key of the {names[0]} is "
    return Case(statements, question, (keys[0],))


def _several_values(rng: Random) -> Case:
    name, values = rng.choice(WORDS), _numbers(rng, NUM_VALUES)
    statements = tuple(f"\n# Important: a number of the {name} is {value}. Remember it: {value}.\n" for value in values)
    question = f"\n# Question: what are all numbers of the {name}, in their order? The numbers of the {name} are "
    return Case(statements, question, values)


def _variable_tracking(rng: Random) -> Case:
    values, names = _numbers(rng, NUM_CHAINS), _names(rng, NUM_CHAINS * CHAIN_LENGTH)
    chains = [names[start : start + CHAIN_LENGTH] for start in range(0, len(names), CHAIN_LENGTH)]
    written = []
    for chain, value in zip(chains, values, strict=True):
        sources = [value, *chain[:-1]]
        written.append([f"\n# Note: {name} = {source}\n" for name, source in zip(chain, sources, strict=True)])
    turns = [index for index in range(NUM_CHAINS) for _ in range(CHAIN_LENGTH)]
    rng.shuffle(turns)
    statements = tuple(written[index].pop(0) for index in turns)
    question = f"\n# Question: which variables have the value {values[0]}, in their order? The variables are "
    return Case(statements, question, tuple(chains[0]))


def _common_words(rng: Random) -> Case:
    words = rng.sample(WORDS, len(COMMON_COUNTS) + NUM_RARE)
    common, rare = words[: len(COMMON_COUNTS)], words[len(COMMON_COUNTS) :]
    listed = rare + [word for word, count in zip(common, COMMON_COUNTS, strict=True) for _ in range(count)]
    rng.shuffle(listed)
    statements = tuple(f"\n# Word: {word}\n" for word in listed)
    question = "\n# Question: which words were listed most often, the most frequent first? The words are "
    return Case(statements, question, tuple(common))


def _numbers(rng: Random, count: int) -> tuple[str, ...]:
    return tuple(str(number) for number in rng.sample(range(10000, 100000), count))


def _names(rng: Random, count: int) -> list[str]:
    names = []
    while len(names) < count:
        name = "".join(rng.choices(string.ascii_uppercase, k=5))
        if name not in names:
            names.append(name)
    return names


TASKS = {
    task.name: task
    for task in (
        Task("pass_key", _pass_key, has_depth=True),
        Task("several_keys", _several_keys, has_depth=True),
        Task("several_values", _several_values, has_depth=False),
        Task("variable_tracking", _variable_tracking, has_depth=False),
        Task("common_words", _common_words, has_depth=False),
    )
}
"""Name -> task, in the order of the tables."""
