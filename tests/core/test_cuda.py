"""The CUDA kernels against the reference: those for the GPU at hand, and those for others, which it runs as well."""

import logging
import random
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import flash_dmattn
from flash_dmattn import dispatch, planned
from flash_dmattn.backends.cuda import library, sm80_backward
from flash_dmattn.backends.cuda.target import ARCHITECTURE_VARIABLE, find_target
from flash_dmattn.dispatch import explain_backends

from .attention_cases import documents
from .kernel_cases import DEVICE, GPU_CASES, TILED_CASES, check, make_inputs, options, run, scattered, tiled

sys.path.append(str(Path(__file__).resolve().parents[2] / "kernels"))
from cuda_build import settings  # noqa: E402

WHY_NOT = explain_backends()["cuda"] or library.why_not_on(torch.device("cuda", 0))
on_the_gpu = [pytest.mark.gpu, pytest.mark.skipif(WHY_NOT is not None, reason=f"no CUDA backend: {WHY_NOT}")]
pytestmark = on_the_gpu

HEAD_DIMS = tuple(map(int, settings.HEAD_DIMS))
IS_HOPPER = WHY_NOT is None and torch.cuda.get_device_capability() == (9, 0)
once = pytest.mark.parametrize("architecture", [""], ids=["own"], indirect=True)
for_hopper = pytest.mark.skipif(WHY_NOT is None and not IS_HOPPER, reason="of the backward for Hopper alone")
MOST_NEEDED = {256: 148480}  # bytes of shared memory, where the backward has no shape for less


@pytest.fixture(params=("", "80", "120"), ids=("own", "sm80", "sm120"), autouse=True)
def architecture(request, monkeypatch):
    """The kernels for the GPU itself, and the sm80 kernels in their shapes for much and for little shared memory."""
    monkeypatch.setenv(ARCHITECTURE_VARIABLE, request.param)


def random_case(number, seed):
    """Returns one of the combinations of shapes and options that the backend must serve."""
    choose = random.Random(f"{seed} {number}")
    group = choose.randint(1, 16)
    num_kv_heads = choose.choice((1, 2, 3))
    per_query_head = group <= 4 and choose.random() < 0.15
    window = choose.choice((1, 7, 64, 100, 256, 1000))
    num_sink_tokens = choose.choice((0, 0, min(4, window)))
    local_window_size = choose.choice((0, 0, (window - num_sink_tokens) // 2, window - num_sink_tokens))
    changes = {
        "keep_window_size": window,
        "num_sink_tokens": num_sink_tokens,
        "local_window_size": local_window_size,
        "softcap": choose.choice((0.0, 0.0, 3.0)),
        "softmax_scale": choose.choice((None, 0.03, 0.4)),
        "add_importance_bias": choose.random() < 0.8,
    }
    seqlen_k = choose.choice((1, 2, 33, 127, 128, 129, 500, 1000, choose.randint(1, 1500)))
    seqlen_q = seqlen_k if choose.random() < 0.7 else choose.randint(1, seqlen_k)
    batch = choose.choice((1, 2))
    if choose.random() < 0.25:
        changes["padding_mask"] = scattered(batch, seqlen_k)
    elif choose.random() < 0.2:
        batch, seqlen_q = 1, seqlen_k
        bounds = [0, *sorted(choose.randint(0, seqlen_k) for _ in range(choose.randint(0, 4))), seqlen_k]
        changes["cu_seqlens"] = documents(*(end - start for start, end in zip(bounds, bounds[1:], strict=False)))
    return tiled(
        name=f"random-{number}",
        batch=batch,
        seqlen_q=seqlen_q,
        seqlen_k=seqlen_k,
        num_heads=group * num_kv_heads,
        num_kv_heads=num_kv_heads,
        num_importance_heads=group * num_kv_heads if per_query_head else None,
        head_dim=choose.choice(HEAD_DIMS),
        dtype=choose.choice((torch.bfloat16, torch.float16)),
        importance=choose.choice(("iid", "iid", "up", "down", "constant", "ties", "some-inf", "huge-ties")),
        options=options(**changes),
    )


@pytest.mark.parametrize("case", TILED_CASES, ids=str)
def test_kernels_equal_the_reference(case, seed):
    check(replace(case, head_dim=64, dtype=torch.bfloat16), seed, "cuda")


@pytest.mark.parametrize("case", GPU_CASES, ids=str)
def test_kernels_equal_the_reference_at_larger_shapes(case, seed):
    case = case if case.dtype != torch.float32 else replace(case, dtype=torch.bfloat16)
    check(case, seed, "cuda")


OTHER_HEAD_DIMS = [
    tiled(
        f"keys-d{head_dim}-values-d{value_dim}-{kind}",
        batch=1 if kind == "packed" else 2,
        seqlen_q=1000,
        seqlen_k=1000,
        num_heads=8,
        num_kv_heads=2,
        head_dim=head_dim,
        value_dim=value_dim,
        dtype=torch.bfloat16,
        options=options(keep_window_size=200, local_window_size=60, **chosen),
    )
    for head_dim, value_dim in ((192, 128), (128, 192), (96, 96), (80, 64), (80, 80), (160, 160), (40, 40), (224, 100))
    for kind, chosen in (
        ("causal", {}),
        ("packed", {"cu_seqlens": documents(3, 0, 497, 1, 499)}),
        ("padded", {"padding_mask": scattered(2, 1000)}),
    )
]
"""Head dims that the library has kernels for, and those that it fills up to the next."""


@pytest.mark.parametrize("case", OTHER_HEAD_DIMS, ids=str)
def test_other_head_dims_equal_the_reference_without_triton(case, seed, monkeypatch):
    rows = 256 if case.head_dim == 224 else case.head_dim
    if find_target(torch.device("cuda", 0)).shared_bytes >= MOST_NEEDED.get(rows, 0):
        forbid_triton(monkeypatch)
    check(case, seed, "cuda")


@once
@for_hopper
def test_deterministic_gradients_of_filled_up_rows_are_bitwise_equal(seed, monkeypatch):
    forbid_triton(monkeypatch)
    case = tiled("filled-up", seqlen_q=3000, seqlen_k=3000, num_heads=8, num_kv_heads=2, head_dim=80)
    case = replace(case, dtype=torch.bfloat16, options=options(keep_window_size=300, deterministic=True))
    first, *others = (run(case, seed, "cuda") for _ in range(4))
    for other in others:
        assert all(torch.equal(*pair) for pair in zip(first, other, strict=True))


@pytest.mark.parametrize("number", range(200))
def test_random_combinations_equal_the_reference(number, seed):
    case = random_case(number, seed)
    try:
        check(case, seed + number, "cuda")
    except AssertionError as error:
        raise AssertionError(f"{case} with seed {seed}: {error}") from error


def test_every_element_is_written(seed):
    case = tiled("poisoned", seqlen_q=700, seqlen_k=700, num_heads=6, num_kv_heads=2, head_dim=128)
    case = replace(case, dtype=torch.bfloat16)
    tensors = [tensor.requires_grad_() for tensor in make_inputs(case, seed)[0]]

    def poison():  # what is allocated next lies where this was
        torch.full((case.seqlen_q * case.num_heads * case.head_dim * 16,), torch.nan, device=DEVICE)

    for _ in range(3):
        poison()
        results = flash_dmattn.dynamic_mask_attention(*tensors, **case.options, return_lse=True, backend="cuda")
        dout, dlse = (torch.ones_like(result) for result in results)
        poison()
        gradients = torch.autograd.grad(results, tensors, (dout, dlse))
        assert all(result.isfinite().all() for result in (*results, *gradients))


def test_two_forwards_are_bitwise_equal(seed):
    case = replace(tiled("twice", seqlen_q=900, seqlen_k=900, num_heads=4, head_dim=128), dtype=torch.bfloat16)
    first, second = (run(case, seed, "cuda", gradients=False) for _ in range(2))
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))


PLANNED_CASES = [
    tiled("planned", seqlen_q=900, seqlen_k=900, num_heads=8, num_kv_heads=2),
    tiled("planned-dense", seqlen_q=900, seqlen_k=900, num_heads=8, options=options(keep_window_size=1000)),
    tiled("planned-few-queries", batch=2, seqlen_q=37, seqlen_k=900, num_heads=4, num_kv_heads=2),
    tiled("planned-dense-few-queries", batch=2, seqlen_q=37, seqlen_k=900, options=options(keep_window_size=1000)),
    tiled("planned-per-query-head", seqlen_q=700, seqlen_k=700, num_heads=4, num_kv_heads=2, num_importance_heads=4),
    tiled("planned-no-bias", seqlen_q=700, seqlen_k=700, options=options(add_importance_bias=False)),
    tiled("planned-not-causal", seqlen_q=700, seqlen_k=700, options=options(is_causal=False, local_window_size=0)),
    tiled("planned-sliding-window", seqlen_q=700, seqlen_k=700, options=options(sliding_window=100)),
    tiled("planned-importance-bfloat16", seqlen_q=700, seqlen_k=700, importance_dtype=torch.bfloat16),
    tiled("planned-infinite-ties", seqlen_q=700, seqlen_k=700, importance="infinite-ties"),
]


@pytest.mark.parametrize("case", PLANNED_CASES, ids=str)
def test_a_planned_call_gives_the_bits_of_the_long_way(case, seed, monkeypatch):
    """Gradients are compared to the bit only where they are added up in a fixed order."""
    is_hopper = find_target(torch.device("cuda", 0)).is_for_sm90a
    chosen = {**case.options, "deterministic": is_hopper}
    case = replace(case, head_dim=128, dtype=torch.bfloat16, options=chosen)
    with monkeypatch.context() as without:
        without.setattr(planned, "DEVICES", set())
        long_way = run(case, seed, "cuda")
    planned._ROUTES.clear()
    run(case, seed, "cuda")
    assert [route is None for route in planned._ROUTES.values()] == [False]
    monkeypatch.setattr(sys.modules["flash_dmattn.attention"], "attend", None)
    by_plan = run(case, seed, "cuda")
    without_gradients = run(case, seed, "cuda", gradients=False)
    assert all(torch.equal(*pair) for pair in zip(by_plan[:2], long_way[:2], strict=True))
    assert all(torch.equal(*pair) for pair in zip(without_gradients, long_way[:2], strict=True))
    for got, right in zip(by_plan[2:], long_way[2:], strict=True):
        torch.testing.assert_close(
            got, right, **({"rtol": 0, "atol": 0} if is_hopper else {"rtol": 2e-2, "atol": 2e-2})
        )


def test_a_planned_call_runs_in_a_cuda_graph(seed):
    case = tiled("planned-graph", seqlen_q=700, seqlen_k=700, num_heads=8, num_kv_heads=2, head_dim=128)
    tensors = [tensor.requires_grad_() for tensor in make_inputs(replace(case, dtype=torch.bfloat16), seed)[0]]
    dout = torch.randn_like(tensors[0])

    def work():
        out = flash_dmattn.dynamic_mask_attention(*tensors, **case.options, backend="cuda")
        return out, *torch.autograd.grad(out, tensors, dout)

    with torch.cuda.stream(torch.cuda.Stream()):
        for _ in range(2):
            work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = work()
    with torch.no_grad():
        for tensor in tensors:
            tensor.copy_(torch.randn_like(tensor))
    graph.replay()
    for got, expected in zip(captured, work(), strict=True):
        torch.testing.assert_close(got, expected, rtol=2e-2, atol=2e-2)


def test_a_planned_call_takes_other_addresses_each_time(seed):
    """Also those that no kernel can read, which another backend then does."""
    memory = torch.randn(3, 1, 300, 2, 72, device=DEVICE, dtype=torch.bfloat16)
    importance = torch.randn(1, 2, 300, device=DEVICE)
    for start in (0, 8, 0, 1):
        query, key, value = memory[..., start : start + 64].unbind()
        got = flash_dmattn.dynamic_mask_attention(query, key, value, importance, keep_window_size=50)
        expected = flash_dmattn.dynamic_mask_attention(
            query.contiguous(), key.contiguous(), value.contiguous(), importance, keep_window_size=50
        )
        torch.testing.assert_close(got, expected, rtol=2e-2, atol=2e-2)


def forbid_triton(monkeypatch):
    def refuse(*_):
        raise AssertionError("the backward of the Triton backend was called")

    monkeypatch.setattr(flash_dmattn.backends.triton, "backward", refuse)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_the_backward_is_not_triton_s(head_dim, dtype, seed, monkeypatch):
    if find_target(torch.device("cuda", 0)).shared_bytes < MOST_NEEDED.get(head_dim, 0):
        pytest.skip(f"the backward for head dim {head_dim} needs more shared memory")
    forbid_triton(monkeypatch)
    case = tiled("own", num_heads=6, num_kv_heads=2, head_dim=head_dim, dtype=dtype)
    check(case, seed, "cuda")


@pytest.mark.parametrize("architecture", ["80", "120"], ids=["sm80", "sm120"], indirect=True)
@pytest.mark.parametrize("window", [300, 5000], ids=["listed", "dense"])
def test_a_few_epochs_at_a_time_give_the_same_gradients(window, seed, monkeypatch):
    monkeypatch.setattr(sm80_backward, "_KEYS_OF_PROCESSOR", 1)
    forbid_triton(monkeypatch)
    case = tiled("rounds", batch=2, seqlen_q=3000, seqlen_k=3000, num_heads=6, num_kv_heads=2)
    case = replace(case, head_dim=128, dtype=torch.bfloat16, options=options(keep_window_size=window))
    check(case, seed, "cuda")


def deterministic_cases():
    base = tiled("epochs", seqlen_q=3000, seqlen_k=3000, num_heads=8, num_kv_heads=2)
    window = options(keep_window_size=300, deterministic=True)
    cases = [
        replace(base, options=window),
        replace(base, name="drift-softcap", batch=2, importance="up", options={**window, "softcap": 3.0}),
        replace(base, name="dense", batch=2, options={**window, "keep_window_size": 5000}),
        replace(base, name="per-query-head", num_importance_heads=8, options=window),
        replace(base, name="padded", batch=2, options={**window, "padding_mask": scattered(2, 3000)}),
        replace(base, name="packed", options={**window, "cu_seqlens": documents(3, 697, 1, 2299)}),
    ]
    return [
        replace(case, name=f"{case.name}-d{head_dim}", head_dim=head_dim, dtype=torch.bfloat16)
        for head_dim in HEAD_DIMS
        for case in cases
    ]


@once
@for_hopper
@pytest.mark.parametrize("case", deterministic_cases(), ids=str)
def test_deterministic_gradients_are_bitwise_equal(case, seed, monkeypatch):
    forbid_triton(monkeypatch)
    check(case, seed, "cuda")
    first, *others = (run(case, seed, "cuda") for _ in range(4))
    for other in others:
        assert all(torch.equal(*pair) for pair in zip(first, other, strict=True))


@once
def test_triton_s_backward_serves_with_a_reason(seed, monkeypatch, caplog):
    dispatch._announce.cache_clear()
    case = tiled("unordered", head_dim=64, dtype=torch.bfloat16)
    tensors = [tensor.requires_grad_() for tensor in make_inputs(case, seed)[0]]
    visibility = flash_dmattn.select_visible(tensors[3].detach(), keep_window_size=20)
    rows = torch.randperm(case.seqlen_q, device=DEVICE).int()[None]

    def gradients(**choice):
        out = flash_dmattn.interval_attention(*tensors, visibility, query_positions=rows, backend="cuda", **choice)
        return torch.autograd.grad(out.float().square().sum(), tensors)

    expected = gradients()
    with caplog.at_level(logging.INFO, logger="flash_dmattn"):
        for got, right in zip(gradients(deterministic=True), expected, strict=True):
            torch.testing.assert_close(got, right, rtol=2e-2, atol=2e-2)
    assert "no fixed order" in caplog.text
    forbid_triton(monkeypatch)
    with pytest.raises(AssertionError, match="Triton"):
        gradients(deterministic=True)


@pytest.mark.parametrize("needs_gradients", [False, True])
def test_the_forward_allocates_at_most_96_bytes_a_key(needs_gradients):
    query = torch.randn(1, 32768, 32, 128, device=DEVICE, dtype=torch.bfloat16, requires_grad=needs_gradients)
    key, value = (query.detach()[:, :, :8].clone() for _ in range(2))
    importance = torch.randn(1, 8, 32768, device=DEVICE)
    for _ in range(2):  # the first makes the plan
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        out = flash_dmattn.dynamic_mask_attention(query, key, value, importance, keep_window_size=2048, backend="cuda")
        needed = torch.cuda.max_memory_allocated() - before - out.nbytes
        del out
    assert needed <= 96 * importance.numel()


def test_the_backward_allocates_less_than_a_float32_query():
    query = torch.randn(1, 16384, 32, 128, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    key, value = (query.detach()[:, :, :8].clone().requires_grad_() for _ in range(2))
    importance = torch.randn(1, 8, 16384, device=DEVICE, requires_grad=True)
    tensors = query, key, value, importance
    out = flash_dmattn.dynamic_mask_attention(*tensors, keep_window_size=1024, backend="cuda")
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    gradients = torch.autograd.grad(out, tensors, torch.ones_like(out))
    returned = sum(gradient.nbytes for gradient in gradients) + out.nbytes  # and the ones
    assert torch.cuda.max_memory_allocated() - before - returned < 4 * query.numel()


def test_both_ways_run_in_a_cuda_graph(seed):
    case = tiled("graph", seqlen_q=700, seqlen_k=700, num_heads=8, num_kv_heads=2, head_dim=128)
    case = replace(case, dtype=torch.bfloat16)
    tensors = [tensor.requires_grad_() for tensor in make_inputs(case, seed)[0]]
    visibility = flash_dmattn.select_visible(tensors[3].detach(), keep_window_size=100)
    dout = torch.randn_like(tensors[0])

    def work():
        out = flash_dmattn.interval_attention(*tensors, visibility, max_visible=100, backend="cuda")
        return torch.autograd.grad(out, tensors, dout)

    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = work()
    with torch.no_grad():
        for tensor in tensors[:3]:
            tensor.copy_(torch.randn_like(tensor))
        dout.copy_(torch.randn_like(dout))
    for _ in range(2):
        graph.replay()
        for got, expected in zip(captured, work(), strict=True):
            torch.testing.assert_close(got, expected, rtol=2e-2, atol=2e-2)


def test_strided_inputs(seed):
    case = replace(tiled("strided", seqlen_q=300, seqlen_k=300, num_heads=4, head_dim=128), dtype=torch.bfloat16)
    inputs, _, weights = make_inputs(case, seed)
    dout = weights[..., :-1].to(case.dtype)

    def work(dout, *tensors):
        tensors = [tensor.detach().requires_grad_() for tensor in tensors]
        out = flash_dmattn.dynamic_mask_attention(*tensors, **case.options, backend="cuda")
        return out, *torch.autograd.grad(out, tensors, dout)

    def turn(x):
        return x.transpose(1, 2).contiguous().transpose(1, 2)

    query, key, value, importance = inputs
    out, *expected = work(dout, *inputs)
    got_out, *got = work(turn(dout), turn(query), *torch.stack([key, value], dim=2).unbind(2), turn(importance))
    assert torch.equal(got_out, out)
    for mine, right in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, right, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"dtype": torch.float32}, "float32"),
        ({"head_dim": 24}, "from 24 to twice"),
        ({"num_heads": 17}, "17 query heads"),
    ],
    ids=["float32", "head-dim", "group-size"],
)
def test_refusals_name_the_reason(change, words, seed):
    case = replace(tiled("refused", head_dim=64, dtype=torch.bfloat16), **change)
    (query, key, value, importance), _, _ = make_inputs(case, seed)
    with pytest.raises(RuntimeError, match=words):
        flash_dmattn.dynamic_mask_attention(query, key, value, importance, keep_window_size=8, backend="cuda")


def test_rows_that_are_not_aligned_are_refused():
    query = torch.randn(1, 10, 2, 65, device=DEVICE, dtype=torch.bfloat16)[..., 1:]
    with pytest.raises(RuntimeError, match="aligned"):
        flash_dmattn.dynamic_mask_attention(
            query, query, query, query[..., 0].float().transpose(1, 2), keep_window_size=8, backend="cuda"
        )
