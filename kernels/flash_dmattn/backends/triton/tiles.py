"""Pieces that the forward and the backward kernels share: a query tile, its stretch of a key list, gathering keys."""

import triton
import triton.language as tl

from flash_dmattn.dropout import NUM_ROUNDS as _NUM_ROUNDS

LOG2E = tl.constexpr(1.4426950408889634)
NUM_ROUNDS = tl.constexpr(_NUM_ROUNDS)


@triton.jit
def tanh(x):
    return 2 / (1 + tl.exp2(-2 * 1.4426950408889634 * x)) - 1


@triton.jit
def load_keys(
    entries_ptr,
    biases_ptr,
    offset,
    end,
    BLOCK_N: tl.constexpr,
    LISTED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Loads BLOCK_N places of a list: key numbers, biases, and which of them count.

    Without MASKED all places are before `end`. Where keys are not LISTED, those of bias -inf do not count.
    """
    place = offset + tl.arange(0, BLOCK_N)
    counts = place < end
    if HAS_BIAS:
        if MASKED:
            bias = tl.load(biases_ptr + place, mask=counts, other=float("-inf"))
        else:
            bias = tl.load(biases_ptr + place)
    else:
        bias = tl.zeros((BLOCK_N,), tl.float32)
    if not LISTED:
        key_index = place
        counts = counts & (bias > float("-inf"))
    elif MASKED:
        key_index = tl.load(entries_ptr + place, mask=counts, other=0)
    else:
        key_index = tl.load(entries_ptr + place)
    return key_index, bias, counts


@triton.jit
def gather_rows(ptr, index, stride, counts, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr):
    """Gathers rows of a (S, D) matrix as (BLOCK, BLOCK_D), zero where nothing counts and beyond the head dim."""
    dim = tl.arange(0, BLOCK_D)
    address = ptr + index.to(tl.int64)[:, None] * stride + dim[None, :]
    if HEAD_DIM < BLOCK_D:
        rows = tl.load(address, mask=counts[:, None] & (dim < HEAD_DIM)[None, :], other=0.0)
    elif MASKED:
        rows = tl.load(address, mask=counts[:, None], other=0.0)
    else:
        rows = tl.load(address)
    return rows


@triton.jit
def is_visible(birth_ptr, death_ptr, key_index, counts, row, LISTED: tl.constexpr):
    """Returns (rows, keys) whether a query row sees a key; keys that are not LISTED live from their own row on."""
    if LISTED:
        birth = tl.load(birth_ptr + key_index, mask=counts, other=2147483647)
        death = tl.load(death_ptr + key_index, mask=counts, other=-1)
        visible = (birth[None, :] <= row[:, None]) & (row[:, None] < death[None, :])
    else:
        visible = counts[None, :] & (key_index[None, :] <= row[:, None])
    return visible


@triton.jit
def query_tile(
    epoch, tile, seqlen_q, EPOCH: tl.constexpr, TILE: tl.constexpr, GROUP: tl.constexpr, BLOCK_M: tl.constexpr
):
    """Returns, for the BLOCK_M rows of a query tile: the query, the head in its group, whether the row exists."""
    lane = tl.arange(0, BLOCK_M)
    token = tile * TILE + lane // GROUP
    query = epoch * EPOCH + token
    return query, lane % GROUP, (lane < TILE * GROUP) & (token < EPOCH) & (query < seqlen_q)


@triton.jit
def query_rows(
    start_ptr, positions_ptr, batch, query, exists, seqlen_q, HAS_START: tl.constexpr, HAS_POSITIONS: tl.constexpr
):
    """Returns the row numbers of queries, -1 where a row sees nothing."""
    if HAS_POSITIONS:
        row = tl.load(positions_ptr + batch.to(tl.int64) * seqlen_q + query, mask=exists, other=-1)
    else:
        row = tl.where(exists, tl.load(start_ptr + batch) + query, -1)
    return row


@triton.jit
def find_stretch(
    sections_ptr, stretches_ptr, list_index, tile, tiles_per_epoch, row, seqlen_k,
    LISTED: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Returns the stretch of the list that a query tile needs: begin, first_full, last_full, end.

    The blocks from first_full up to last_full hold only keys that all its rows see.
    """
    if LISTED:
        stretches_ptr += (list_index * tiles_per_epoch + tile) * 2
        begin = tl.load(stretches_ptr)
        end = tl.load(stretches_ptr + 1)
        num_dying = tl.load(sections_ptr + list_index * 3)
        num_alive = tl.load(sections_ptr + list_index * 3 + 1)
    else:
        begin = 0
        end = tl.minimum(tl.max(row, axis=0) + 1, seqlen_k)
        num_dying = 0
        num_alive = tl.minimum(tl.min(tl.where(row < 0, 2147483646, row), axis=0) + 1, end)
    first_full = begin + tl.cdiv(tl.maximum(num_dying - begin, 0), BLOCK_N) * BLOCK_N
    last_full = first_full + tl.maximum(num_alive - first_full, 0) // BLOCK_N * BLOCK_N
    return begin, tl.minimum(first_full, end), tl.minimum(last_full, end), end


@triton.jit
def load_thresholds(threshold_ptr, head, query_index, exists, seqlen_q, HAS_SOFT: tl.constexpr):
    """Returns the threshold of each query row, times log2(e); -inf where nothing is gated."""
    if HAS_SOFT:
        place = head.to(tl.int64) * seqlen_q + query_index
        threshold = tl.load(threshold_ptr + place, mask=exists, other=float("-inf")) * LOG2E
    else:
        threshold = query_index.to(tl.float32)  # nobody reads it
    return threshold


@triton.jit
def load_scores(score_ptr, contested_ptr, key_index, counts):
    """Returns the scores of keys, times log2(e), and the rows from which they are gated."""
    score = tl.load(score_ptr + key_index, mask=counts, other=0.0) * LOG2E
    # Finite, so that its distance from a threshold of -inf is a number.
    return tl.maximum(score, -3e38), tl.load(contested_ptr + key_index, mask=counts, other=2147483647)


@triton.jit
def soft_gate(score, threshold, contested_from, row):
    """Returns, for pairs of keys and query rows, the sigmoid as 2 ** exponent * factor, and the slope of its logarithm.

    The exponent is 0 at most, the factor between 1/2 and 1: so no logarithm is needed, and whatever is added to the
    exponent, the sum over keys neither overflows nor vanishes. The arguments broadcast against each other.
    """
    distance = tl.where(row >= contested_from, score - threshold, float("inf"))
    falling = tl.exp2(-tl.abs(distance))
    factor = 1.0 / (1.0 + falling)
    slope = tl.where(distance >= 0, falling, 1.0) * factor
    return tl.minimum(distance, 0.0), factor, slope


@triton.jit
def load_seed(seed_ptr, batch, HAS_DROPOUT: tl.constexpr):
    """Returns the dropout seed of a row of the batch."""
    if HAS_DROPOUT:
        seed = tl.load(seed_ptr + batch)
    else:
        seed = batch.to(tl.int64)  # nobody reads it
    return seed


@triton.jit
def keep_factors(seed, head, query, key, drop_limit, keep_scale):
    """Returns what dropout multiplies weights with, as `flash_dmattn.dropout.keeps` says: 0 or keep_scale.

    head, query, key: int32, of pairs, which broadcast against each other.
    """
    zero = (head + query + key) * 0
    word, _, _, _ = tl.philox(seed, key + zero, query + zero, head + zero, zero, n_rounds=NUM_ROUNDS)
    return tl.where((word >> 1).to(tl.int32) >= drop_limit, keep_scale, 0.0)
