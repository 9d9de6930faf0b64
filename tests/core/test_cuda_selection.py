"""Selection by the CUDA library equals selection in torch on the CPU, bit for bit."""

import random

import pytest
import torch
from conftest import SEED

from flash_dmattn import select_visible
from flash_dmattn.backends.cuda import library
from flash_dmattn.backends.cuda import selection as cuda_selection

from .selection_cases import LAYOUTS, draw_cases

WHY_NOT = library.why_not_on(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))]

NAN, INF = float("nan"), float("inf")


def on_gpu(options: dict) -> dict:
    return {name: value.cuda() if isinstance(value, torch.Tensor) else value for name, value in options.items()}


def assert_equal_to_the_cpu(importance: torch.Tensor, **options) -> None:
    moved = importance.cuda()
    assert cuda_selection.reject(moved) is None
    got = select_visible(moved, **on_gpu(options))
    expected = select_visible(importance, **options)
    for name, ours, truth in zip(("birth", "death"), got, expected, strict=True):
        differ = (ours.cpu() != truth).nonzero()
        assert len(differ) == 0, f"{name} differs in {len(differ)} places, first {differ[0].tolist()}, of {options}"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_small_random_cases(layout):
    for case in draw_cases():
        if case.layout == layout and case.importance.dtype != torch.float64:
            assert_equal_to_the_cpu(case.importance, **case.options)


def walk(shape):
    return torch.randn(shape).cumsum(-1)


VALUES = {
    "distinct": torch.randn,
    "ties": lambda shape: torch.randn(shape).mul(3).round(),
    "rectified": lambda shape: torch.randn(shape).relu(),
    "constant": torch.zeros,
    "up": lambda shape: torch.linspace(0, 9, shape[-1]) + 0.1 * torch.randn(shape),
    "down": lambda shape: torch.linspace(9, 0, shape[-1]) + 0.1 * torch.randn(shape),
    "sorted": lambda shape: torch.randn(shape).sort(-1).values,
    "sorted-down": lambda shape: torch.randn(shape).sort(-1, descending=True).values,
    "walk": walk,
    "last-wins": lambda shape: torch.arange(shape[-1]).ge(shape[-1] - 300).float().expand(shape) + torch.randn(shape),
    "special": lambda shape: torch.tensor([NAN, -INF, INF, 0.0, -0.0, 1.0, -1.0])[torch.randint(7, shape)],
}


@pytest.mark.parametrize("seqlen", [255, 256, 257, 1500, 5000])
@pytest.mark.parametrize("values", VALUES)
def test_values_and_lengths(values, seqlen):
    importance = VALUES[values]((2, 3, seqlen))
    for w, s, r in ((1, 0, 0), (2, 1, 1), (64, 4, 16), (300, 0, 0), (1024, 3, 700), (seqlen - 1, 0, 0), (seqlen, 0, 1)):
        assert_equal_to_the_cpu(importance, keep_window_size=w, num_sink_tokens=s, local_window_size=r)


@pytest.mark.parametrize(
    ("values", "w", "seqlen"),
    [("distinct", 2048, 70001), ("walk", 2048, 65536), ("up", 16384, 60000), ("ties", 30, 40000)],
)
def test_long_sequences(values, w, seqlen):
    importance = VALUES[values]((1, 2, seqlen))
    assert_equal_to_the_cpu(importance, keep_window_size=w)
    assert_equal_to_the_cpu(importance, keep_window_size=w, num_sink_tokens=4, local_window_size=w // 2)
    assert_equal_to_the_cpu(importance, keep_window_size=w, is_causal=False)


@pytest.mark.parametrize("values", ["distinct", "ties", "up", "special"])
def test_padding_and_documents_at_length(values):
    rng = random.Random(SEED)
    for _ in range(5):
        seqlen = rng.randint(500, 5000)
        w = rng.choice([1, 3, 50, 400, 2000])
        s = rng.randint(0, min(w, 5))
        options = {"keep_window_size": w, "num_sink_tokens": s, "local_window_size": rng.randint(0, w - s)}
        if rng.random() < 0.5:
            options["sliding_window"] = rng.randint(1, 3 * w)
        batch = rng.choice([1, 2])
        if rng.random() < 0.5:
            options["padding_mask"] = torch.rand(batch, seqlen) < rng.choice([0.3, 0.9])
        if batch == 1 and rng.random() < 0.7:
            bounds = sorted(rng.randint(0, seqlen) for _ in range(rng.choice([1, 5, 300])))
            options["cu_seqlens"] = torch.tensor([0, *bounds, seqlen], dtype=torch.int32)
        importance = VALUES[values]((batch, 2, seqlen))
        assert_equal_to_the_cpu(importance, **options)
        if "sliding_window" not in options:
            assert_equal_to_the_cpu(importance, **{**options, "local_window_size": 0, "is_causal": False})


@pytest.mark.parametrize("values", ["distinct", "ties", "up", "special"])
def test_a_chunk_behind_a_cache(values):
    batch, num_heads, w, chunk = 2, 3, 700, 3000
    shape = (batch, num_heads, w + chunk)
    cached = torch.rand(batch, num_heads, 9000).argsort(-1)[..., :w]  # w of the first 9000 positions, in any order
    cached = cached.masked_fill(torch.rand(batch, num_heads, w) < 0.1, -1)
    positions = torch.cat([cached, torch.arange(9000, 9000 + chunk).expand(batch, num_heads, chunk)], -1).int()
    for s, r, window in ((0, 0, None), (4, 300, None), (2, 699, 1000)):
        options = {"keep_window_size": w + 1, "num_sink_tokens": s, "local_window_size": r, "sliding_window": window}
        assert_equal_to_the_cpu(VALUES[values](shape), positions=positions, **options)


def test_many_documents_of_one_token():
    bounds = torch.arange(3001, dtype=torch.int32)
    assert_equal_to_the_cpu(torch.randn(1, 2, 3000), keep_window_size=1, cu_seqlens=bounds)
    assert_equal_to_the_cpu(torch.randn(1, 2, 6000), keep_window_size=1, cu_seqlens=2 * bounds)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_strided_importance(dtype):
    view = torch.randn(2, 900, 6).to(dtype)[:, ::2, ::2].transpose(1, 2)
    assert_equal_to_the_cpu(view, keep_window_size=40)


def test_two_runs_are_equal_and_do_not_wait_for_the_device():
    importance = torch.randn(1, 8, 20000, device="cuda")
    first = select_visible(importance, keep_window_size=1000)
    torch.cuda.set_sync_debug_mode("error")
    try:
        second = select_visible(importance, keep_window_size=1000)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_captured_graph_selects_for_what_stands_in_its_input():
    importance = torch.randn(1, 4, 6000, device="cuda")
    select_visible(importance, keep_window_size=500)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = select_visible(importance, keep_window_size=500)
    importance.copy_(torch.randn(1, 4, 6000))
    graph.replay()
    expected = select_visible(importance.cpu(), keep_window_size=500)
    assert all(torch.equal(a.cpu(), b) for a, b in zip(captured, expected, strict=True))


@pytest.mark.parametrize("w", [2048, 16384])
def test_memory_stays_below_56_bytes_a_key(w):
    importance = torch.randn(1, 8, 65536, device="cuda")
    select_visible(importance, keep_window_size=w)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    select_visible(importance, keep_window_size=w)
    assert (torch.cuda.max_memory_allocated() - before) / importance.numel() < 56
