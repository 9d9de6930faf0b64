"""Bidirectional blocks: found as written down, seen in whole, and nothing else changes."""

import random

import pytest
import torch
from conftest import SEED

from flash_dmattn import Blocks, dynamic_mask_attention, find_blocks, select_visible

from .attention_cases import AttentionCase, assert_close, documents, padding, window
from .definition import inside_intervals, sequences_of_row, visible_keys
from .selection_cases import draw_cu_seqlens, draw_importance, draw_padding
from .soft_definition import attention as soft_attention
from .test_chunks import PrunedKeys


def starts_of_blocks(numbers, padding_mask, cu_seqlens):
    """By hand: the row at which the block of each real key begins, its own for the others, and the longest block."""
    starts, longest = torch.arange(numbers.shape[1]).repeat(len(numbers), 1), 1
    for b, own in enumerate(numbers.tolist()):
        real = [True] * len(own) if padding_mask is None else padding_mask[b].tolist()
        for rows in sequences_of_row(len(own), real, cu_seqlens):
            block = []
            for place, row in enumerate(rows):
                if not (place and own[row] >= 0 and own[row] == own[rows[place - 1]]):
                    block = []
                block.append(row)
                starts[b, row] = block[0]
                longest = max(longest, len(block))
    return starts, longest


def draw(rng, length=None):
    """numbers (B, Sk), and the padding or documents they stand in."""
    layout = rng.choice(["plain", "left", "interior", "packed", "packed-padded"])
    batch, seqlen = 1 if "packed" in layout else 2, length or rng.randint(1, 24)
    places = {}
    if layout != "plain" and layout != "packed":
        places["padding_mask"] = draw_padding(rng, layout.removeprefix("packed-"), batch, seqlen)
    if "packed" in layout:
        places["cu_seqlens"] = draw_cu_seqlens(rng, seqlen)
    numbers = []
    for _ in range(batch):
        row = []
        while len(row) < seqlen:
            row += [rng.choice([-1, -1, -2, 0, 0, 1, 7])] * rng.randint(1, 5)
        numbers.append(row[:seqlen])
    return torch.tensor(numbers), places


@pytest.mark.parametrize("number", range(60))
def test_blocks_are_found(number):
    numbers, places = draw(random.Random(SEED + number))
    expected, longest = starts_of_blocks(numbers, places.get("padding_mask"), places.get("cu_seqlens"))
    found = find_blocks(numbers, **places)
    assert torch.equal(found.start, expected.int()) and found.size == longest


def test_no_token_is_no_block():
    assert find_blocks(torch.zeros(2, 0, dtype=torch.long)).size == 1


def draw_windows(rng, blocks, seqlen):
    s, r = rng.choice([0, 2]), blocks.size + rng.choice([0, 1, 5])
    windows = window(s + r + rng.choice([0, 1, 4]), s, r)
    if rng.random() < 0.2:  # nothing is evicted, whatever fits into the local window
        windows = window(seqlen + 2, 0, rng.choice([0, 2]))
    if rng.random() < 0.4:
        windows["sliding_window"] = blocks.size + rng.choice([0, 3, 30])
    return windows


def problem(number):
    """importance, the options of a selection without blocks, and the blocks."""
    rng = random.Random(SEED + number)
    numbers, places = draw(rng)
    blocks = find_blocks(numbers, **places)
    importance = draw_importance(rng, (len(numbers), 2, numbers.shape[1]), torch.float32)
    return importance, {**draw_windows(rng, blocks, numbers.shape[1]), **places}, blocks


def seen_by_real_rows(importance, options, **more):
    seen = inside_intervals(select_visible(importance, **options, **more), range(importance.shape[2]))
    mask = options.get("padding_mask")
    return seen if mask is None else seen & mask[:, None, :, None]


@pytest.mark.parametrize("number", range(100))
def test_selection_equals_the_definition(number):
    importance, options, blocks = problem(number)
    expected = visible_keys(importance, **options, blocks=blocks)
    assert torch.equal(seen_by_real_rows(importance, options, blocks=blocks), expected)


@pytest.mark.parametrize("number", range(100))
def test_a_row_sees_its_block_and_what_it_saw_without_blocks(number):
    importance, options, blocks = problem(number)
    same = blocks.start[:, :, None] == blocks.start[:, None, :]
    if (mask := options.get("padding_mask")) is not None:
        same &= mask[:, :, None] & mask[:, None, :]
    alone = seen_by_real_rows(importance, options)
    # An own token outside of blocks is seen as without them: not always, if there is no local window.
    own = torch.eye(importance.shape[2], dtype=torch.bool)
    assert torch.equal(
        seen_by_real_rows(importance, options, blocks=blocks), alone | (same & ~own)[:, None].expand_as(alone)
    )


@pytest.mark.parametrize("number", range(100))
def test_no_key_dies_at_another_time_and_few_are_seen_at_once(number):
    importance, options, blocks = problem(number)
    visibility = select_visible(importance, **options, blocks=blocks)
    assert torch.equal(visibility.death, select_visible(importance, **options).death)
    seen = seen_by_real_rows(importance, options, blocks=blocks)
    most = options["keep_window_size"] + blocks.size - 1
    assert (seen.sum(-1) <= most).all()
    for count in (2, 7):  # what max_visible promises
        for first in range(seen.shape[2]):
            assert (seen[:, :, first : first + count].any(2).sum(-1) <= most + count).all()


@pytest.mark.parametrize("chunks", [[20, 40], [9, 1, 1, 9, 40], [60]], ids=str)
def test_chunks_that_split_no_block_see_the_same_keys_as_one_pass(chunks):
    numbers = torch.full((1, 60), -1)
    numbers[:, 2:9], numbers[:, 11:20], numbers[:, 33:42] = 0, 1, 2
    blocks, options = find_blocks(numbers), window(14, 2, 9)
    importance = torch.randn(1, 2, 60).round()
    expected = visible_keys(importance, **options, blocks=blocks)[0]
    keys = PrunedKeys(importance, options, random.Random(SEED), births=blocks.start[0])
    start = 0
    for count in chunks:
        assert torch.equal(keys.process(start, start + count), expected[:, start : start + count])
        start += count


ROWS = torch.tensor([[-1, 0, 0, 0, 0, -1, -1, 1, 1, 1, -1]])
REFUSED = {
    "longer than the local window": (window(9, 1, 3), "local_window_size must hold.*has 4 tokens, got 3"),
    "longer than the sliding window": (window(90, 1, 8, sliding_window=3), "sliding_window must hold.*got 3"),
    "not causal": (window(9, is_causal=False), "blocks must be None when is_causal=False"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    options, sentence = REFUSED[case]
    with pytest.raises(ValueError, match=sentence):
        select_visible(torch.randn(1, 2, 11), **options, blocks=find_blocks(ROWS))


def test_refused_arguments():
    importance = torch.randn(1, 2, 11)
    with pytest.raises(ValueError, match="blocks must be what find_blocks returns, got Tensor"):
        select_visible(importance, **window(9, 1, 4), blocks=ROWS)
    with pytest.raises(ValueError, match=r"blocks.start must have shape \(1, 11\)"):
        select_visible(importance, **window(9, 1, 4), blocks=find_blocks(ROWS[:, 1:]))
    with pytest.raises(ValueError, match="blocks.start must be int32"):
        select_visible(importance, **window(9, 1, 4), blocks=Blocks(ROWS, 4))
    for numbers in (ROWS.float(), ROWS > 0, ROWS[0]):
        with pytest.raises(ValueError, match="numbers must be integers of shape"):
            find_blocks(numbers)
    with pytest.raises(ValueError, match="padding_mask must have shape"):
        find_blocks(ROWS, padding_mask=padding("1" * 10))
    with pytest.raises(ValueError, match="needs a packed batch of 1"):
        find_blocks(ROWS.repeat(2, 1), cu_seqlens=documents(11))


def test_gradcheck():
    case = AttentionCase("gradcheck", 1, 8, 11, 4, 2, head_dim=3, dtype=torch.float64, importance_dtype=torch.float64)
    inputs = [x.requires_grad_() for x in case.inputs()]
    inputs[3].data = torch.randperm(22).view(1, 2, 11).double() / 11  # no two so close that a step changes the ranks
    options = window(7, 1, 4, softcap=3.0, blocks=find_blocks(ROWS), return_lse=True)
    assert torch.autograd.gradcheck(lambda *tensors: dynamic_mask_attention(*tensors, **options), inputs)


@pytest.mark.parametrize("number", range(20))
def test_a_soft_cut_equals_its_definition(number):
    rng = random.Random(SEED + number)
    numbers, places = draw(rng, length=24)
    blocks, batch = find_blocks(numbers, **places), len(numbers)
    options = {**window(blocks.size + 4, 1, blocks.size), **places, "blocks": blocks}
    tensors = [torch.randn(batch, 24, heads, 4, dtype=torch.float64) for heads in (2, 1, 1)]
    importance = torch.randn(batch, 1, 24, dtype=torch.float64)
    soft = dynamic_mask_attention(*tensors, importance, selection_temperature=0.5, selection_band=1.5, **options)
    assert_close("out", soft, soft_attention(*tensors, importance, 0.5, 1.5, **options)[0], torch.float64)
