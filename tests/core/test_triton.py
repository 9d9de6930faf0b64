"""The Triton kernels against the reference: on a GPU, or small shapes in Triton's interpreter."""


import pytest
import torch

import flash_dmattn

from .attention_cases import CASES
from .kernel_cases import DEVICE, GPU_CASES, HAS_GPU, TILED_CASES, check, make_inputs, options, run, tiled

pytest.importorskip("triton", reason="Triton is published for Linux only")
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")


DTYPES = (torch.float32, torch.float16, *((torch.bfloat16,) if HAS_GPU else ()))  # numpy, which interprets, has none
SERVED = [case for case in CASES if case.dtype in DTYPES and not case.strided]


@pytest.mark.parametrize("case", [*SERVED, *TILED_CASES], ids=str)
def test_kernels_equal_the_reference(case, seed):
    check(case, seed, "triton")


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU, reason="needs a CUDA GPU: half precision and large shapes")
@pytest.mark.parametrize("case", GPU_CASES, ids=str)
def test_kernels_equal_the_reference_in_half_precision(case, seed):
    check(case, seed, "triton")


def test_strided_importance_and_visibility():
    query = torch.randn(1, 40, 2, 16, device=DEVICE)
    importance = torch.randn(1, 40, 2, device=DEVICE).transpose(1, 2)
    out, expected = (
        flash_dmattn.dynamic_mask_attention(query, query, query, importance, keep_window_size=6, backend=backend)
        for backend in ("triton", "reference")
    )
    torch.testing.assert_close(out, expected)
    birth, death = flash_dmattn.select_visible(importance, keep_window_size=6)
    strided = flash_dmattn.Visibility(*(bound.transpose(1, 2).contiguous().transpose(1, 2) for bound in (birth, death)))
    out = flash_dmattn.interval_attention(query, query, query, importance, strided, max_visible=6, backend="triton")
    torch.testing.assert_close(out, expected)


def test_keys_of_many_documents_that_are_born_at_once():
    query = torch.randn(1, 600, 1, 16, device=DEVICE)
    importance = torch.randn(1, 1, 600, device=DEVICE)
    bounds = torch.arange(0, 601, 50, dtype=torch.int32, device=DEVICE)
    visibility = flash_dmattn.select_visible(importance, keep_window_size=50, is_causal=False, cu_seqlens=bounds)
    out, expected = (
        flash_dmattn.interval_attention(query, query, query, importance, visibility, backend=backend)
        for backend in ("triton", "reference")
    )
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)


def test_unseen_rows_are_written_as_zero():
    query = torch.randn(1, 20, 2, 16, device=DEVICE)
    never = torch.zeros(1, 2, 20, dtype=torch.int32, device=DEVICE)
    visibility = flash_dmattn.Visibility(never, never)
    out, lse = flash_dmattn.interval_attention(
        query, query, query, None, visibility, max_visible=1, return_lse=True, backend="triton"
    )
    assert torch.equal(out, torch.zeros_like(out)) and lse.isneginf().all()


def test_keys_in_any_order_and_queries_by_position(seed):
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(2, 30, 4, 16, generator=generator).to(DEVICE)
    key, value = torch.randn(2, 2, 90, 2, 16, generator=generator).to(DEVICE)
    importance = torch.randn(2, 2, 90, generator=generator).to(DEVICE)
    birth = torch.randint(0, 60, (2, 2, 90), generator=generator, dtype=torch.int32).to(DEVICE)
    visibility = flash_dmattn.Visibility(birth, birth + 25)
    positions = torch.randint(-1, 80, (2, 30), generator=generator, dtype=torch.int32).to(DEVICE)
    outs = [
        flash_dmattn.interval_attention(
            query, key, value, importance, visibility, query_positions=positions, backend=backend
        )
        for backend in ("triton", "reference")
    ]
    torch.testing.assert_close(*outs, atol=2e-5, rtol=1e-4)


def test_strided_query_rows():
    query = torch.randn(2, 30, 2, 16, device=DEVICE)
    importance = torch.randn(2, 2, 30, device=DEVICE)
    visibility = flash_dmattn.select_visible(importance, keep_window_size=6)
    rows = torch.arange(60, dtype=torch.int32, device=DEVICE).view(30, 2)
    for given in ({"query_positions": rows.t() // 2}, {"query_start": rows[0].expand(2, 2)[:, 0]}):
        out, expected = (
            flash_dmattn.interval_attention(query, query, query, importance, visibility, **given, backend=backend)
            for backend in ("triton", "reference")
        )
        torch.testing.assert_close(out, expected, atol=2e-5, rtol=1e-4)


def test_nan_in_a_row_is_not_an_empty_row():
    query, key, value = torch.randn(3, 1, 40, 2, 16, device=DEVICE)
    query[0, 30] = torch.nan
    importance = torch.randn(1, 2, 40, device=DEVICE)
    for size in (8, 40):
        (out, lse), (expected, expected_lse) = (
            flash_dmattn.dynamic_mask_attention(
                query, key, value, importance, keep_window_size=size, return_lse=True, backend=backend
            )
            for backend in ("triton", "reference")
        )
        assert out[0, 30].isnan().all() and lse[0, :, 30].isnan().all()
        torch.testing.assert_close((out, lse), (expected, expected_lse), atol=2e-5, rtol=1e-4, equal_nan=True)


def test_an_understated_max_visible_stays_inside_memory():
    query, key, value = torch.randn(3, 1, 600, 1, 16, device=DEVICE)
    visibility = flash_dmattn.select_visible(torch.randn(1, 1, 600, device=DEVICE), keep_window_size=600)
    out = flash_dmattn.interval_attention(query, key, value, None, visibility, max_visible=1, backend="triton")
    assert out.isfinite().all()


@pytest.mark.parametrize("heads", [1, 6], ids=["per-kv-head", "per-query-head"])
def test_deterministic_gradients_are_bitwise_equal(heads, seed):
    case = tiled("twice", num_heads=6, num_importance_heads=heads, options=options(deterministic=True))
    for first, second in zip(run(case, seed, "triton"), run(case, seed, "triton"), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"dtype": torch.float64}, "float64"),
        ({"head_dim": 264}, "head dim 264"),
        ({"num_heads": 33}, "33 query heads"),
        ({"batch": 65536, "seqlen_q": 1, "seqlen_k": 1}, "65536 .batch, head. pairs"),
    ],
    ids=["float64", "head-dim", "group-size", "heads-in-all"],
)
def test_refusals_name_the_reason(change, words, seed):
    (query, key, value, importance), _, _ = make_inputs(tiled("refused", **change), seed)
    with pytest.raises(RuntimeError, match=words):
        flash_dmattn.dynamic_mask_attention(query, key, value, importance, keep_window_size=8, backend="triton")


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs: one that is current, and another one")
@pytest.mark.parametrize("backend", ["auto", "triton"])
@pytest.mark.parametrize("size", [32, 500])
def test_tensors_of_a_gpu_that_is_not_current(backend, size, seed):
    tensors, _, _ = make_inputs(tiled("elsewhere", head_dim=64, dtype=torch.bfloat16), seed)
    results = []
    for device in ("cuda:0", "cuda:1"):
        moved = [tensor.detach().to(device).requires_grad_() for tensor in tensors]
        chosen = options(deterministic=True, keep_window_size=size)
        out = flash_dmattn.dynamic_mask_attention(*moved, **chosen, backend=backend)
        out.float().square().sum().backward()
        results.append([result.cpu() for result in (out, *(tensor.grad for tensor in moved))])
    assert torch.cuda.current_device() == 0
    for here, there in zip(*results, strict=True):
        assert torch.equal(here, there)


@pytest.mark.parametrize(("length", "k"), [(1, 0), (7, 2), (1500, 37), (2100, 500)])
def test_order_statistics_equal_those_of_torch(length, k, seed):
    from flash_dmattn.backends.triton import order_statistics
    from flash_dmattn.competition import kth_smallest_in_ranges

    generator = torch.Generator().manual_seed(seed)
    sequence = torch.stack([torch.randperm(length, generator=generator) for _ in range(2)])
    high = torch.arange(length).expand(2, length)
    low = torch.randint(0, length, (2, length), generator=generator).minimum(high)
    expected = kth_smallest_in_ranges(sequence, low, high, k)
    got = order_statistics.kth_smallest_in_ranges(sequence.to(DEVICE), low.to(DEVICE), high.to(DEVICE), k)
    holds_enough = high - low > k
    assert torch.equal(got.cpu()[holds_enough], expected[holds_enough])


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU, reason="needs a CUDA GPU: selection there runs other kernels than on a CPU")
@pytest.mark.parametrize("seqlen", [1, 1000, 1025, 40_000])
def test_selection_on_the_gpu_equals_selection_on_the_cpu(seqlen, seed):
    generator = torch.Generator().manual_seed(seed)
    importance = torch.randn(2, 3, seqlen, generator=generator).mul(8).round().div(8)
    padding_mask = torch.rand(2, seqlen, generator=generator) > 0.2
    bounds = torch.tensor([0, seqlen // 3, seqlen // 3, seqlen], dtype=torch.int32)
    for arguments in ({}, {"padding_mask": padding_mask}, {"cu_seqlens": bounds}):
        for windows in (options(), options(num_sink_tokens=0, local_window_size=0), options(keep_window_size=700)):
            given = importance[:1] if "cu_seqlens" in arguments else importance
            expected = flash_dmattn.select_visible(given, **windows, **arguments)
            moved = {name: tensor.cuda() for name, tensor in arguments.items()}
            got = flash_dmattn.select_visible(given.cuda(), **windows, **moved)
            for one, other in zip(got, expected, strict=True):
                assert torch.equal(one.cpu(), other)
