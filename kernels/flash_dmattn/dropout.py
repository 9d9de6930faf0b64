"""Dropout of attention weights: which pairs of a query and a key are kept, from a seed alone.

Nothing is stored between forward and backward. A pair is kept if the first word of Philox4x32-7, with the batch row's
seed as its key and (key, query, head, 0) as its counter, is large enough. Key and query are their places in the call's
tensors, so every backend and every tiling drops the same pairs.
"""

import torch

NUM_ROUNDS = 7
"""Rounds of Philox, the fewest that pass BigCrush (Salmon et al., 2011)."""

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_STEPS = (0x9E3779B9, 0xBB67AE85)  # of the key, after every round
_MASK = 0xFFFFFFFF


def draw_seed(batch: int, device: torch.device) -> torch.Tensor:
    """Returns a seed for each row of a batch, (B,) int64, from torch's generator of the device."""
    return torch.randint(2**63 - 1, (batch,), dtype=torch.int64, device=device)


def drop_limit(dropout_p: float) -> int:
    """Returns the number below which a word of 31 bits drops its pair."""
    return min(round(dropout_p * 2**31), 2**31 - 1)


def keeps(
    seed: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor, dropout_p: float
) -> torch.Tensor:
    """Returns which pairs are kept, bool, in the shape that the four tensors broadcast to.

    seed: int64, that of the pair's batch row. head, query, key: integers from 0 below 2 ** 31, the query head, and the
    places of query and key in the tensors of the call.
    """
    key, query, head, low, high = (
        tensor.long() & _MASK for tensor in (*torch.broadcast_tensors(key, query, head), seed, seed >> 32)
    )
    first, second, third, fourth = key, query, head, torch.zeros_like(key)
    for _ in range(NUM_ROUNDS):
        (low_first, high_first), (low_third, high_third) = _multiply(first, 0), _multiply(third, 1)
        first, second = high_third ^ second ^ low, low_third
        third, fourth = high_first ^ fourth ^ high, low_first
        low, high = (low + _STEPS[0]) & _MASK, (high + _STEPS[1]) & _MASK
    return (first >> 1) >= drop_limit(dropout_p)


def _multiply(word: torch.Tensor, number: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the low and the high 32 bits of a word times one of the multipliers, within 63 bits."""
    upper, lower = divmod(_MULTIPLIERS[number], 2**16)
    below = lower * word
    above = upper * word + (below >> 16)
    return ((above << 16) | (below & 0xFFFF)) & _MASK, above >> 16
