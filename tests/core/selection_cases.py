"""Random selection problems, and the options that each of them really contains."""

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations, product

import torch
from conftest import SEED

from .definition import FLOAT32_MAX, NEVER

NUM_CASES = 600
LAYOUTS = ["plain", "left", "right", "interior", "packed", "positions"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SPECIALS = [math.nan, math.inf, -math.inf, -0.0, 0.0, FLOAT32_MAX]


@dataclass
class SelectionCase:
    name: str
    layout: str
    importance: torch.Tensor
    options: dict

    def __str__(self):
        return f"{self.name}: importance={self.importance.tolist()} ({self.importance.dtype}), {self.options}"


def draw_lane(rng, seqlen, kinds):
    """Values of one sequence: distinct, tied, constant, sorted, rectified, or barely different."""
    kind = rng.choice(kinds)
    values = [rng.gauss(0, 1) for _ in range(seqlen)]
    if kind == "few":
        values = [float(round(x)) for x in values]
    elif kind == "constant":
        values = [rng.choice([0.0, 1.5, -2.0])] * seqlen
    elif kind == "rectified":
        values = [max(x, 0.0) for x in values]
    elif kind in ("ascending", "descending"):
        values.sort(reverse=kind == "descending")
    elif kind == "close":
        values = [1 + x * 1e-12 for x in values]  # equal in float32
    if rng.random() < 0.4:
        for index in rng.sample(range(seqlen), min(seqlen, rng.randint(1, 4))):
            values[index] = rng.choice(SPECIALS)
    return values


def draw_importance(rng, shape, dtype):
    kinds = ["normal", "few", "constant", "rectified", "ascending", "descending"]
    if dtype == torch.float64:
        kinds += ["close"] * 4
    lanes = [draw_lane(rng, shape[2], kinds) for _ in range(shape[0] * shape[1])]
    values = torch.tensor(lanes, dtype=torch.float64).view(shape)
    finite_max = min(FLOAT32_MAX, torch.finfo(dtype).max)
    return torch.where(values == FLOAT32_MAX, finite_max, values).to(dtype)


def draw_window(rng, seqlen, is_causal):
    """keep_window_size, num_sink_tokens and local_window_size."""
    w = rng.choice([1, 2, rng.randint(1, 9), rng.randint(3, 12), seqlen + rng.randint(1, 5), 10**6])
    if w > 1000:
        return w, rng.choice([0, 2]), rng.choice([0, 3]) if is_causal else 0
    s = rng.choice([0, min(w, rng.randint(1, 3))])
    r = rng.choice([0, rng.randint(0, w - s)]) if is_causal else 0
    if rng.random() < 0.25:  # nothing left to compete for
        s, r = (s, w - s) if is_causal else (w, 0)
    return w, s, r


def draw_padding(rng, layout, batch, seqlen):
    """bool (B, Sk), True where the token is real; sometimes a row without any."""
    mask = torch.ones(batch, seqlen, dtype=torch.bool)
    for row in mask:
        count = rng.randint(0, seqlen)
        if layout == "left":
            row[:count] = False
        elif layout == "right":
            row[seqlen - count :] = False
        else:
            row[rng.sample(range(seqlen), count)] = False
    if batch and rng.random() < 0.2:
        mask[rng.randrange(batch)] = False
    return mask


def draw_cu_seqlens(rng, seqlen):
    """int32 (num_docs + 1,): bounds of documents, some of length 0 or 1."""
    bounds = [rng.randint(0, seqlen) for _ in range(rng.randint(0, 4))]
    if bounds and rng.random() < 0.4:
        bounds += [bounds[0]]
    if seqlen and rng.random() < 0.4:
        start = rng.randrange(seqlen)
        bounds += [start, start + 1]
    return torch.tensor([0, *sorted(bounds), seqlen], dtype=torch.int32)


def draw_positions(rng, shape):
    """int32 (B, Hi, Sk): distinct positions in any order, -1 for empty slots, some near the int32 maximum."""
    batch, num_heads, seqlen = shape
    first = rng.choice([0, 3, 10**6, NEVER - 3 * seqlen])
    rows = []
    for _ in range(batch * num_heads):
        numbers = rng.sample(range(first, first + 3 * seqlen), seqlen)
        if rng.random() < 0.4:
            numbers.sort()
        for index in range(seqlen):
            if rng.random() < rng.choice([0, 0.3]):
                numbers[index] = -1
        rows.append(numbers)
    return torch.tensor(rows, dtype=torch.int32).view(shape)


def draw_case(rng, name):
    layout = rng.choice(LAYOUTS)
    batch = 1 if layout == "packed" else rng.choice([1, 2])
    num_heads = rng.choice([1, 2])
    seqlen = rng.choice([0, 1, 2, *[rng.randint(3, 24)] * 12])
    importance = draw_importance(rng, (batch, num_heads, seqlen), rng.choice(DTYPES))
    is_causal = rng.random() < 0.75
    w, s, r = draw_window(rng, seqlen, is_causal)
    options = {"keep_window_size": w, "num_sink_tokens": s, "local_window_size": r, "is_causal": is_causal}
    if is_causal and rng.random() < 0.5:
        options["sliding_window"] = rng.choice([rng.randint(1, w), w + rng.randint(0, 5), NEVER, NEVER - 2])
    if layout in ("left", "right", "interior"):
        options["padding_mask"] = draw_padding(rng, layout, batch, seqlen)
    elif layout == "packed":
        options["cu_seqlens"] = draw_cu_seqlens(rng, seqlen)
        if rng.random() < 0.3:
            options["padding_mask"] = draw_padding(rng, "interior", batch, seqlen)
    elif layout == "positions":
        options["positions"] = draw_positions(rng, importance.shape)
    return SelectionCase(name, layout, importance, options)


PADDING = {"padding_mask", "padded start", "padded end", "padded inside", "padded row"}
DOCUMENTS = {"cu_seqlens", "document of length 0", "document of length 1"}
POSITIONS = {"positions", "empty slot", "shuffled", "late positions"}
VALUES = {"ties", "constant", "rectified", "nan", "inf", "-inf", "-0.0", "differs only in float64"}
ALTERNATIVES = [
    {"float32", "bfloat16", "float16", "float64"},
    {"sinks", "no sinks"},
    {"local window", "no local window"},
    {"no competition", "competition"},
    {"causal", "not causal"},
    {"one batch row", "batch"},
    {"one head", "heads"},
    {"no key", "one key", "keys"},
    {"no sliding window", "sliding below w", "sliding from w on", "huge sliding window"},
    {"all keys fit", "w = 1", "w below Sk"},
]
"""Sets of options of which a case has one."""

NEVER_TOGETHER = [
    (POSITIONS, PADDING | DOCUMENTS),
    (DOCUMENTS, {"batch"}),
    ({"not causal"}, {"local window", "sliding below w", "sliding from w on", "huge sliding window"}),
    ({"w = 1"}, {"sliding below w"}),
    ({"differs only in float64"}, {"float32", "bfloat16", "float16"}),
    ({"no key", "one key"}, VALUES | PADDING | DOCUMENTS | POSITIONS | {"w = 1", "w below Sk"}),
]
"""Options of the first set exclude those of the second; layouts are looked for in cases with several keys."""

OPTIONS = sorted(set().union(PADDING, DOCUMENTS, POSITIONS, VALUES, *ALTERNATIVES))


def options_of(case) -> set[str]:
    """What a case contains, read from its arguments and not from how it was drawn."""
    x, o = case.importance, case.options
    batch, num_heads, seqlen = x.shape
    w, s, r = o["keep_window_size"], o["num_sink_tokens"], o["local_window_size"]
    found = {
        str(x.dtype).removeprefix("torch."),
        "sinks" if s else "no sinks",
        "local window" if r else "no local window",
        "no competition" if s + r == w else "competition",
        "causal" if o["is_causal"] else "not causal",
        "batch" if batch > 1 else "one batch row",
        "heads" if num_heads > 1 else "one head",
        ["no key", "one key", "keys"][min(seqlen, 2)],
        *(name for name in ("padding_mask", "cu_seqlens", "positions") if name in o),
    }
    length = o.get("sliding_window")
    if length is None:
        found.add("no sliding window")
    elif length >= NEVER - 2:
        found.add("huge sliding window")
    else:
        found.add("sliding below w" if length < w else "sliding from w on")
    if seqlen < 2:
        return found | {"all keys fit"}
    found.add("all keys fit" if w >= seqlen else "w = 1" if w == 1 else "w below Sk")
    return found | value_options(x) | layout_options(o)


def value_options(x) -> set[str]:
    lanes = x.flatten(0, 1).tolist()
    finite = torch.where(x.isfinite(), x.double(), 0.0).flatten(0, 1)
    found = {
        "ties": any(len(set(lane)) < len(lane) for lane in lanes),
        "constant": any(len(set(lane)) == 1 for lane in lanes),
        "rectified": any(min(lane) == 0 < max(lane) and lane.count(0) > 1 for lane in lanes),
        "nan": x.isnan().any(),
        "inf": (x == math.inf).any(),
        "-inf": (x == -math.inf).any(),
        "-0.0": ((x == 0) & x.signbit()).any(),
        "differs only in float64": any(
            len(set(lane)) > len(set(rounded))
            for lane, rounded in zip(finite.tolist(), finite.float().tolist(), strict=True)
        ),
    }
    return {name for name, present in found.items() if present}


def layout_options(o) -> set[str]:
    found = {}
    if "padding_mask" in o:
        mask = o["padding_mask"]
        some = mask.any(1)
        inner = (mask.cumsum(1) > 0) & (mask.flip(1).cumsum(1).flip(1) > 0) & ~mask
        found = {
            "padded start": (some & ~mask[:, 0]).any(),
            "padded end": (some & ~mask[:, -1]).any(),
            "padded inside": inner.any(),
            "padded row": (~some).any(),
        }
    if "cu_seqlens" in o:
        lengths = o["cu_seqlens"].diff().tolist()
        found |= {"document of length 0": 0 in lengths, "document of length 1": 1 in lengths}
    if "positions" in o:
        positions = o["positions"]
        found = {
            "empty slot": (positions < 0).any(),
            "shuffled": (positions.diff(dim=-1) < 0).any(),
            "late positions": (positions > NEVER - 100).any(),
        }
    return {name for name, present in found.items() if present}


def required_pairs() -> set[tuple[str, str]]:
    """Every pair of options that can meet in one case."""
    pairs = {frozenset(pair) for pair in combinations(OPTIONS, 2)}
    for group in ALTERNATIVES:
        pairs -= {frozenset(pair) for pair in combinations(group, 2)}
    for first, second in NEVER_TOGETHER:
        pairs -= {frozenset(pair) for pair in product(first, second)}
    return {tuple(sorted(pair)) for pair in pairs}


def draw_cases() -> Iterator[SelectionCase]:
    """NUM_CASES random cases; the first of those are such that every pair of options occurs."""
    rng = random.Random(SEED)
    missing = required_pairs()
    number = 0
    for _ in range(20_000):
        if not missing:
            break
        case = draw_case(rng, f"case {number}")
        pairs = set(combinations(sorted(options_of(case)), 2))
        if pairs & missing:
            missing -= pairs
            number += 1
            yield case
    while number < NUM_CASES:
        yield draw_case(rng, f"case {number}")
        number += 1
