"""KL divergence and its gradient in one kernel: a program reads both rows of logits of a token, twice.

The first time for the largest logits and the sums of exponentials, the second time for the divergence, the likeliest
words and the gradient. With TRITON_INTERPRET=1 it runs on tensors of a CPU, slowly, for tests.
"""

import torch
import triton
import triton.language as tl

# Large programs, so that few rows are read at the same time and the second reading may find them in the cache: with
# two programs on each of 132 SMs, rows of 49152 words in bfloat16 take 52 MB. No word is held by two threads, whatever
# the vocabulary: where the gradient replaces the logits, a thread must not read what another has written.
_BLOCK = 4096  # words read at a time
_WARPS = 16


def run_divergence(
    expected: torch.Tensor, logits: torch.Tensor, factors: torch.Tensor, gradient: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns KL(softmax(expected) || softmax(logits)) and whether the likeliest words are equal, both (rows,).

    The first is float32, in nats; the second int32, 1 or 0. Among words of the largest logit the first is the
    likeliest. Both are 0 where the factor is not above 0, and nothing of such a row is read.

    expected, logits: (rows, vocabulary), float32, bfloat16 or float16, each of its own. factors: (rows,) float32.
    gradient: (rows, vocabulary) contiguous, where factor * (softmax(logits) - softmax(expected)) is written, rounded to
        its dtype; zeros where the factor is not above 0. It may be logits. None: no gradient is made.
    """
    rows, vocabulary = logits.shape
    nats = torch.empty(rows, dtype=torch.float32, device=logits.device)
    is_same = torch.empty(rows, dtype=torch.int32, device=logits.device)
    if rows > 0:
        _divergence[(rows,)](
            nats,
            is_same,
            nats if gradient is None else gradient,
            expected.contiguous(),
            logits.contiguous(),
            factors.contiguous(),
            vocabulary,
            BLOCK=_BLOCK,
            HAS_GRADIENT=gradient is not None,
            num_warps=_WARPS,
        )
    return nats, is_same


@triton.jit
def _divergence(
    nats_ptr,  # (rows,)
    same_ptr,  # (rows,)
    gradient_ptr,  # (rows, vocabulary)
    expected_ptr,  # (rows, vocabulary)
    logits_ptr,  # (rows, vocabulary)
    factors_ptr,  # (rows,)
    vocabulary,
    BLOCK: tl.constexpr,
    HAS_GRADIENT: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    gradient_ptr += row * vocabulary
    expected_ptr += row * vocabulary
    logits_ptr += row * vocabulary
    factor = tl.load(factors_ptr + row)
    if factor > 0:
        largest_p = tl.full((BLOCK,), float("-inf"), tl.float32)
        largest_q = tl.full((BLOCK,), float("-inf"), tl.float32)
        total_p = tl.zeros((BLOCK,), tl.float32)
        total_q = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, vocabulary, BLOCK):
            word = start + tl.arange(0, BLOCK)
            exists = word < vocabulary
            p_logit = tl.load(expected_ptr + word, mask=exists, other=float("-inf")).to(tl.float32)
            q_logit = tl.load(logits_ptr + word, mask=exists, other=float("-inf")).to(tl.float32)
            largest_p, total_p = _add_exponential(largest_p, total_p, p_logit)
            largest_q, total_q = _add_exponential(largest_q, total_q, q_logit)
        p_max = tl.max(largest_p, axis=0)
        q_max = tl.max(largest_q, axis=0)
        p_log_sum = tl.log(tl.sum(total_p * tl.exp(largest_p - p_max), axis=0))
        q_log_sum = tl.log(tl.sum(total_q * tl.exp(largest_q - q_max), axis=0))

        nats = tl.zeros((BLOCK,), tl.float32)
        p_first = tl.zeros((BLOCK,), tl.int32) + vocabulary
        q_first = tl.zeros((BLOCK,), tl.int32) + vocabulary
        for start in range(0, vocabulary, BLOCK):
            word = start + tl.arange(0, BLOCK)
            exists = word < vocabulary
            p_logit = tl.load(expected_ptr + word, mask=exists, other=float("-inf")).to(tl.float32)
            q_logit = tl.load(logits_ptr + word, mask=exists, other=float("-inf")).to(tl.float32)
            log_p = p_logit - p_max - p_log_sum
            log_q = q_logit - q_max - q_log_sum
            p = tl.exp(log_p)
            # a word that the teacher rules out counts for nothing, even if both logits are -inf
            nats += tl.where(p == 0, 0.0, p * (log_p - log_q))
            p_first = tl.minimum(p_first, tl.where(p_logit == p_max, word, vocabulary))
            q_first = tl.minimum(q_first, tl.where(q_logit == q_max, word, vocabulary))
            if HAS_GRADIENT:
                gradient = (tl.exp(log_q) - p) * factor
                tl.store(gradient_ptr + word, gradient.to(gradient_ptr.dtype.element_ty), mask=exists)
        tl.store(nats_ptr + row, tl.sum(nats, axis=0))
        is_same = tl.min(p_first, axis=0) == tl.min(q_first, axis=0)
        tl.store(same_ptr + row, is_same.to(tl.int32))
    else:
        tl.store(nats_ptr + row, 0.0)
        tl.store(same_ptr + row, 0)
        if HAS_GRADIENT:
            for start in range(0, vocabulary, BLOCK):
                word = start + tl.arange(0, BLOCK)
                zeros = tl.zeros((BLOCK,), gradient_ptr.dtype.element_ty)
                tl.store(gradient_ptr + word, zeros, mask=word < vocabulary)


@triton.jit
def _add_exponential(largest, total, logit):
    """Returns the largest logit so far, and the sum of exp(logit - largest) so far, of every lane.

    A lane that has only seen -inf counts them as 1 each. That sum is multiplied by 0 once a larger logit comes.
    """
    less = tl.where(logit == largest, 1.0, tl.exp(-tl.abs(logit - largest)))
    rises = logit > largest
    return tl.where(rises, logit, largest), tl.where(rises, total * less + 1.0, total + less)
