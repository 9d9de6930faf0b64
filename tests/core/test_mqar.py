"""Multi-query associative recall by a two-layer model that is written down, not trained: what each kind of mask can do.

In its first layer every token looks at the one before it, so that a value knows its key; in the second a key that comes
again looks for the value behind it. The importance of the second layer is linear in its values, as always, and
marks the tokens that are values: one layer of Dynamic Mask Attention keeps them, a window of the same size does not.
"""

import pytest
import torch
from torch.nn.functional import one_hot, softplus

from flash_dmattn import dynamic_mask_attention

NUM_KEYS, NUM_VALUES, NUM_FILLERS, NUM_PAIRS = 24, 16, 10, 24
FIRST_VALUE, FIRST_FILLER = NUM_KEYS, NUM_KEYS + NUM_VALUES
SHARP = 40.0


def sample(seqlen, count):
    """Returns tokens (count, seqlen) and, for the last NUM_PAIRS of them, the values asked for."""
    tokens = FIRST_FILLER + torch.randint(NUM_FILLERS, (count, seqlen))
    keys = torch.rand(count, NUM_KEYS).argsort(-1)[:, :NUM_PAIRS]
    values = torch.randint(NUM_VALUES, (count, NUM_PAIRS))
    tokens[:, 0 : 2 * NUM_PAIRS : 2], tokens[:, 1 : 2 * NUM_PAIRS : 2] = keys, FIRST_VALUE + values
    order = torch.rand(count, NUM_PAIRS).argsort(-1)
    tokens[:, -NUM_PAIRS:] = keys.gather(1, order)
    return tokens, values.gather(1, order)


def answer(tokens, **windows):
    """Returns the model's answers (count, seqlen), -1 where it has none."""
    seqlen = tokens.shape[1]
    is_key, is_value = tokens < FIRST_VALUE, (tokens >= FIRST_VALUE) & (tokens < FIRST_FILLER)
    key_of_token = one_hot(torch.where(is_key, tokens, NUM_KEYS), NUM_KEYS + 1)[..., :NUM_KEYS].float()
    value_of_token = one_hot(torch.where(is_value, tokens - FIRST_VALUE, NUM_VALUES), NUM_VALUES + 1).float()[..., :-1]

    def attend(query, key, value, dt_weight):
        # The importance of DESIGN's log_zoh: A softplus(dt_proj(v)), with A = 1.
        importance = softplus(value @ dt_weight)[:, None]
        width = max(query.shape[-1], value.shape[-1])
        padded = (torch.nn.functional.pad(x, (0, width - x.shape[-1]))[:, :, None] for x in (query, key, value))
        out = dynamic_mask_attention(*padded, importance, softmax_scale=SHARP, **windows)
        return out[:, :, 0, : value.shape[-1]]

    # Layer 1: by position, each token looks at the one before it.
    place = one_hot(torch.arange(seqlen), seqlen).float().expand(len(tokens), -1, -1)
    before = attend(place.roll(1, dims=1), place, key_of_token, torch.zeros(NUM_KEYS))
    # Layer 2: a key looks for the token that came after it.
    found = attend(key_of_token, before, value_of_token, torch.full((NUM_VALUES,), 10.0))
    return torch.where(found.amax(-1) > 0.5, found.argmax(-1), -1)


def accuracy(seqlen, **windows):
    tokens, values = sample(seqlen, 16)
    return (answer(tokens, **windows)[:, -NUM_PAIRS:] == values).float().mean().item()


@pytest.mark.parametrize("seqlen", [256, 400])
def test_all_is_recalled_from_a_quarter_of_the_keys_or_less(seqlen):
    """The window of w = 64 ends far behind the pairs, whose 24 values w - r = 56 keys have room for."""
    chance = 1 / NUM_VALUES
    assert accuracy(seqlen, keep_window_size=seqlen) == 1
    assert accuracy(seqlen, keep_window_size=64, local_window_size=8) == 1
    assert accuracy(seqlen, keep_window_size=64, local_window_size=64) <= 2 * chance
    assert accuracy(seqlen, keep_window_size=64, num_sink_tokens=4, local_window_size=60) <= 2 / NUM_PAIRS + 2 * chance


def test_without_room_for_all_values_the_newest_ones_are_recalled():
    """Values tie, and the newer key wins: 12 places hold the last 12 of 24."""
    assert accuracy(256, keep_window_size=20, local_window_size=8) == pytest.approx(0.5)
