"""Dropout of attention weights: a seed alone says which pairs are dropped, and attention without them is exact."""

import os

import numpy as np
import pytest
import torch
from torch.utils.checkpoint import checkpoint

from flash_dmattn import dynamic_mask_attention, interval_attention
from flash_dmattn.dropout import keeps

from . import definition
from .attention_cases import AttentionCase, assert_close, documents, padding, window
from .kernel_cases import DEVICE, HAS_GPU, options, tiled

SEED = 123456789012345678
DROPPED = [
    AttentionCase("group-of-3", num_heads=6, num_kv_heads=2, options=window(7, 1, 2)),
    AttentionCase("all-keys-fit", options=window(100)),
    AttentionCase("last-queries", seqlen_q=5, seqlen_k=31, options=window(9, 2, 4)),
    AttentionCase("values-shorter", head_dim=12, value_dim=8, num_kv_heads=3, num_importance_heads=1),
    AttentionCase("padding", options=window(7, 1, 2, padding_mask=padding("0" * 9 + "1" * 14, "1" * 23))),
    AttentionCase("softcap-no-bias", options=window(7, softcap=2.0, add_importance_bias=False)),
    AttentionCase(
        "packed", batch=1, seqlen_q=30, seqlen_k=30, options=window(6, 1, 2, cu_seqlens=documents(7, 1, 0, 16, 6))
    ),
]


def philox(seed, key, query, head):
    """The first of four words of Philox4x32-7 as its authors write it down, in unsigned integers of 64 bits."""
    mask = np.uint64(0xFFFFFFFF)
    c0, c1, c2, c3 = (np.uint64(word) for word in (key, query, head, 0))
    k0, k1 = np.uint64(seed) & mask, np.uint64(seed) >> np.uint64(32)
    for _ in range(7):
        left, right = np.uint64(0xD2511F53) * c0, np.uint64(0xCD9E8D57) * c2
        c0, c1 = (right >> np.uint64(32)) ^ c1 ^ k0, right & mask
        c2, c3 = (left >> np.uint64(32)) ^ c3 ^ k1, left & mask
        k0, k1 = (k0 + np.uint64(0x9E3779B9)) & mask, (k1 + np.uint64(0xBB67AE85)) & mask
    return int(c0)


def keep_factor(case, seeds, dropout_p):
    """What dropout multiplies weights with, (B, H, Sq, Sk) float64."""
    head, query, key = (torch.arange(size) for size in (case.num_heads, case.seqlen_q, case.seqlen_k))
    pairs = head[:, None, None], query[:, None], key
    return keeps(seeds.view(-1, 1, 1, 1), *pairs, dropout_p).double() / (1 - dropout_p)


def random_seeds(batch):
    return torch.randint(2**63 - 1, (batch,))


@pytest.mark.parametrize("seed", [0, 1, SEED, 2**63 - 1])
def test_a_pair_is_kept_if_its_word_of_philox_is_large_enough(seed):
    places = torch.tensor([[0, 0, 0], [1, 2, 3], [70000, 5, 3], [2**31 - 1, 2**31 - 1, 127]])
    for dropout_p in (0.1, 0.5, 0.9):
        kept = keeps(torch.tensor(seed), places[:, 2], places[:, 1], places[:, 0], dropout_p)
        assert kept.tolist() == [philox(seed, *place) >= dropout_p * 2**32 for place in places.tolist()]


@pytest.mark.parametrize("dropout_p", [0.1, 0.5])
def test_as_many_pairs_are_kept_as_asked_for_and_neighbours_are_independent(dropout_p):
    places = torch.arange(200)
    kept = keeps(torch.tensor(SEED), torch.arange(4)[:, None, None], places[:, None], places, dropout_p).double()
    bound = 5 * (dropout_p * (1 - dropout_p) / kept.numel()) ** 0.5
    assert abs(kept.mean() - (1 - dropout_p)) < bound
    for one, other in ((kept[1:], kept[:-1]), (kept[:, 1:], kept[:, :-1]), (kept[..., 1:], kept[..., :-1])):
        assert abs((one * other).mean() - (1 - dropout_p) ** 2) < 3 * bound


@pytest.mark.parametrize("case", DROPPED, ids=str)
def test_attention_equals_the_definition_without_what_is_dropped(case):
    seeds, inputs = random_seeds(case.batch), [x.double().requires_grad_() for x in case.inputs()]
    dropout = {"dropout_p": 0.4, "dropout_seed": seeds}
    results = dynamic_mask_attention(*inputs, **case.options, **dropout, return_lse=True)
    expected = definition.dynamic_mask_attention(*inputs, **case.options, keep_factor=keep_factor(case, seeds, 0.4))
    weights = [torch.randn_like(x) for x in expected]
    for name, ours, theirs in zip(("out", "lse"), results, expected, strict=True):
        assert_close(name, ours, theirs.detach(), torch.float64)
    losses = [
        sum((torch.where(x.isfinite(), x, 0) * weight).sum() for x, weight in zip(pair, weights, strict=True))
        for pair in (results, expected)
    ]
    gradients = [torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True) for loss in losses]
    for name, ours, theirs in zip(("query", "key", "value", "importance"), *gradients, strict=True):
        assert_close(f"d{name}", ours, theirs, torch.float64)


def test_gradcheck():
    case = AttentionCase("gradcheck", 1, 6, 9, 4, 2, head_dim=3, value_dim=2)
    inputs = [x.double().requires_grad_() for x in case.inputs()]
    inputs[3].data = torch.randperm(18).view(1, 2, 9).double() / 9  # no two so close that a step changes the ranks
    seeds = random_seeds(1)

    def both(*tensors):
        dropout = {"dropout_p": 0.3, "dropout_seed": seeds}
        return dynamic_mask_attention(*tensors, **window(4, 1, 1), **dropout, return_lse=True)

    assert torch.autograd.gradcheck(both, inputs)


def test_the_mean_over_seeds_is_attention_without_dropout():
    case = AttentionCase("mean", batch=1, seqlen_q=8, seqlen_k=8, options=window(5))
    inputs = [x.expand(2000, -1, -1, -1)[:, :, :, : x.shape[3]] if x.dim() == 4 else x.expand(2000, -1, -1)
              for x in case.inputs()]  # fmt: skip
    plain = dynamic_mask_attention(*(x[:1] for x in inputs), **case.options)
    dropped = dynamic_mask_attention(*inputs, **case.options, dropout_p=0.3)
    error = (dropped.mean(0) - plain[0]) / (dropped.std(0) / 2000**0.5 + 1e-6)
    assert error.abs().max() < 6


def test_without_dropout_nothing_changes_and_nothing_is_drawn():
    inputs = AttentionCase("zero").inputs()
    state = torch.get_rng_state()
    plain = dynamic_mask_attention(*inputs, keep_window_size=7)
    assert torch.equal(plain, dynamic_mask_attention(*inputs, keep_window_size=7, dropout_p=0.0))
    assert torch.equal(state, torch.get_rng_state())


def test_the_seed_comes_from_the_generator_of_torch_and_a_checkpoint_repeats_it():
    inputs = [x.requires_grad_() for x in AttentionCase("drawn").inputs()]

    def attend(*tensors):
        return dynamic_mask_attention(*tensors, keep_window_size=7, dropout_p=0.5)

    def with_gradients(function):
        torch.manual_seed(SEED)
        out = function(*inputs)
        torch.rand(7)
        return out, *torch.autograd.grad(out.square().sum(), inputs)

    plain = with_gradients(attend)
    again = with_gradients(lambda *tensors: checkpoint(attend, *tensors, use_reentrant=False))
    assert all(map(torch.equal, plain, again))
    torch.manual_seed(SEED + 1)
    assert not torch.equal(attend(*inputs), plain[0])


def test_a_compiled_call_drops_what_its_seed_says():
    inputs, seeds = AttentionCase("compiled").inputs(), random_seeds(2)

    def attend(seeds, *tensors):
        return dynamic_mask_attention(*tensors, keep_window_size=7, dropout_p=0.5, dropout_seed=seeds)

    compiled = torch.compile(attend, backend="aot_eager", fullgraph=True)
    for chosen in (seeds, seeds + 1):
        assert torch.equal(compiled(chosen, *inputs), attend(chosen, *inputs))
    assert not torch.equal(compiled(None, *inputs), compiled(None, *inputs))  # each call draws another seed


def test_a_mapped_call_drops_what_the_seeds_of_its_rows_say():
    case = AttentionCase("mapped", batch=6)
    inputs, seeds = case.inputs(), random_seeds(6)

    def attend(seeds, *tensors):
        return dynamic_mask_attention(*tensors, keep_window_size=30, dropout_p=0.5, dropout_seed=seeds)

    mapped = torch.vmap(attend)(seeds.view(3, 2), *(x.view(3, 2, *x.shape[1:]) for x in inputs))
    assert torch.equal(mapped.flatten(0, 1), attend(seeds, *inputs))


REFUSED = [
    ({"dropout_p": 1.0}, "dropout_p must be at least 0 and below 1, got 1.0"),
    ({"dropout_p": -0.1}, "dropout_p must be at least 0 and below 1, got -0.1"),
    ({"dropout_p": 0.5, "dropout_seed": torch.zeros(3, dtype=torch.int64)}, r"dropout_seed must have shape \(2,\)"),
    ({"dropout_p": 0.5, "dropout_seed": torch.zeros(2)}, "dropout_seed must be int64, got torch.float32"),
]


@pytest.mark.parametrize("given, message", REFUSED)
def test_what_does_not_fit_is_refused(given, message):
    query, key, value, importance = AttentionCase("refused").inputs()
    with pytest.raises(ValueError, match=message):
        dynamic_mask_attention(query, key, value, importance, keep_window_size=7, **given)
    with pytest.raises(ValueError, match=message):
        interval_attention(query, key, value, importance, None, **given)


KERNEL_CASES = [
    tiled("tiled", num_heads=6, num_kv_heads=2),
    tiled("dense", num_kv_heads=2, num_heads=4, head_dim=24, value_dim=16, options=options(keep_window_size=500)),
    tiled("fewer-queries-deterministic", batch=2, seqlen_q=37, seqlen_k=200, options=options(deterministic=True)),
]


@pytest.mark.parametrize("case", KERNEL_CASES, ids=str)
def test_the_kernels_of_triton_drop_the_same_pairs(case):
    pytest.importorskip("triton", reason="Triton is published for Linux only")
    if not HAS_GPU and os.environ.get("TRITON_INTERPRET", "0") in ("", "0"):
        pytest.skip("needs a CUDA GPU or Triton's interpreter")
    inputs = [x.to(DEVICE).requires_grad_() for x in case.inputs()]
    # With values that tell the keys apart, and no weight below 1e-4, a pair more or less would show.
    seeds = random_seeds(case.batch).to(DEVICE)

    def results(backend):
        dropout = {"dropout_p": 0.3, "dropout_seed": seeds, "backend": backend}
        out, lse = dynamic_mask_attention(*inputs, **case.options, **dropout, return_lse=True)
        return out, lse, *torch.autograd.grad(out.square().sum() + lse.sum(), inputs)

    for ours, theirs in zip(results("triton"), results("reference"), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU, reason="needs a CUDA GPU: what auto takes there, and half precision")
def test_a_gpu_drops_the_same_pairs_in_half_precision(caplog):
    case = tiled("gpu", seqlen_q=1500, seqlen_k=1500, num_heads=8, num_kv_heads=2, head_dim=128, dtype=torch.bfloat16)
    inputs, seeds = [x.to(DEVICE) for x in case.inputs()], random_seeds(case.batch).to(DEVICE)
    dropout = {"dropout_p": 0.3, "dropout_seed": seeds}
    results = []
    for backend in ("auto", "reference"):
        leaves = [x.detach().requires_grad_() for x in inputs]
        out = dynamic_mask_attention(*leaves, **case.options, **dropout, backend=backend)
        results.append([out.detach(), *torch.autograd.grad(out.float().square().sum(), leaves)])
    for ours, expected in zip(*results, strict=True):
        assert (ours.float() - expected.float()).norm() < 2e-2 * expected.float().norm()
    with pytest.raises(RuntimeError, match="it has no dropout|cannot serve"):
        dynamic_mask_attention(*inputs, **case.options, **dropout, backend="cuda")


def test_backends_without_dropout_say_so():
    from flash_dmattn.backends import cuda, flex
    from flash_dmattn.calls import AttentionCall

    query, key, value, importance = AttentionCase("refused").inputs()
    call = AttentionCall.prepare(query, key, value, importance, None, dropout_p=0.5)
    for backend in (cuda, flex):
        assert backend.reject(call) == "it has no dropout"
