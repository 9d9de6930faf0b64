"""The Triton kernels against the reference: on a GPU, or small shapes in Triton's interpreter."""

import os
from dataclasses import dataclass, field

import pytest
import torch

import flash_dmattn

pytest.importorskip("triton", reason="Triton is published for Linux only")
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")

HAS_GPU = torch.cuda.is_available()
DEVICE = "cuda" if HAS_GPU else "cpu"
ROUNDING = {torch.float32: 2e-5, torch.bfloat16: 1.2e-2, torch.float16: 2e-3}
NAMES = ("out", "lse", "dquery", "dkey", "dvalue", "dimportance")


@pytest.fixture
def seed():
    return int(os.environ["FLASH_DMATTN_TEST_SEED"])


@dataclass(frozen=True)
class Case:
    """One call: shapes, the distribution of the importance, and the options of `dynamic_mask_attention`."""

    name: str
    batch: int = 1
    seqlen_q: int = 150
    seqlen_k: int = 150
    num_heads: int = 2
    num_kv_heads: int = 1
    importance_heads: int = 1
    head_dim: int = 16
    dtype: torch.dtype = torch.float32
    importance: str = "iid"
    options: dict = field(default_factory=lambda: options())
    padding: str | None = None
    cu_seqlens: tuple[int, ...] | None = None


def options(**changes):
    return {"keep_window_size": 32, "num_sink_tokens": 2, "local_window_size": 8, **changes}


CASES = [
    *(Case(f"importance-{kind}", importance=kind) for kind in ("iid", "up", "down", "constant", "ties", "some-inf")),
    Case("top-keys-only", importance="up", options=options(num_sink_tokens=0, local_window_size=0)),
    Case("sinks-and-window-only", options=options(num_sink_tokens=4, local_window_size=28)),
    Case("fewer-queries", seqlen_q=37, seqlen_k=200),
    Case("one-token", seqlen_q=1, seqlen_k=1),
    Case("one-more-than-a-tile", seqlen_q=129, seqlen_k=129),
    Case("per-query-head", num_heads=4, num_kv_heads=2, importance_heads=4),
    Case("group-of-three", num_heads=6, num_kv_heads=2, importance_heads=2),
    Case("no-group", num_kv_heads=2, importance_heads=2),
    Case("dense", options=options(keep_window_size=500)),
    Case(
        "dense-group-of-three", num_heads=6, num_kv_heads=2, importance_heads=2, options=options(keep_window_size=150)
    ),
    Case("dense-fewer-queries", seqlen_q=37, seqlen_k=200, options=options(keep_window_size=200)),
    Case("dense-some-inf", importance="some-inf", options=options(keep_window_size=500)),
    Case("dense-no-bias", options=options(keep_window_size=500, add_importance_bias=False)),
    Case("dense-softcap", num_heads=4, importance_heads=4, options=options(keep_window_size=500, softcap=2.0)),
    *(
        Case(f"{dense}{kind}", importance=kind, options=options(keep_window_size=size))
        for kind in ("huge-ties", "infinite-ties")
        for dense, size in (("", 32), ("dense-", 500))
    ),
    Case("softcap", options=options(softcap=2.0)),
    Case("no-bias", options=options(add_importance_bias=False)),
    Case("not-causal", options=options(is_causal=False, local_window_size=0)),
    Case("sliding-window", options=options(sliding_window=20)),
    Case("deterministic", options=options(deterministic=True)),
    Case("odd-head-dim", head_dim=24),
    Case("padding-interior", padding="interior"),
    Case("padding-left-and-empty-row", batch=2, padding="left-and-empty"),
    Case("packed", cu_seqlens=(0, 3, 3, 50, 51, 150)),
    Case(
        "packed-not-causal",
        cu_seqlens=(0, 3, 3, 50, 51, 150),
        options=options(is_causal=False, local_window_size=0),
    ),
]

GPU_CASES = [
    *(
        Case(
            f"{str(dtype)[6:]}-d{head_dim}-g{group}",
            batch=2,
            seqlen_q=1500,
            seqlen_k=1500,
            num_heads=2 * group,
            num_kv_heads=2,
            importance_heads=2,
            head_dim=head_dim,
            dtype=dtype,
            options=options(keep_window_size=256, local_window_size=100),
        )
        for dtype in (torch.bfloat16, torch.float16)
        for head_dim in (32, 64, 96, 128, 192, 256)
        for group in (1, 3, 4, 8)
    ),
    *(
        Case(
            f"dense-d{head_dim}",
            seqlen_q=700,
            seqlen_k=700,
            num_heads=8,
            num_kv_heads=2,
            importance_heads=2,
            head_dim=head_dim,
            dtype=torch.bfloat16,
            options=options(keep_window_size=1024),
        )
        for head_dim in (32, 64, 96, 128, 192, 256)
    ),
    *(
        Case(
            f"long-{kind}",
            seqlen_q=4099,
            seqlen_k=4099,
            num_heads=8,
            num_kv_heads=2,
            importance_heads=2,
            head_dim=128,
            dtype=torch.bfloat16,
            importance=kind,
            options=options(keep_window_size=1024, local_window_size=local),
        )
        for kind, local in (("iid", 0), ("up", 0), ("down", 512), ("constant", 768))
    ),
    *(
        Case(f"length-{length}", seqlen_q=length, seqlen_k=length, head_dim=128, dtype=torch.bfloat16)
        for length in (1, 127, 128, 129, 1000)
    ),
]


def make_inputs(case, seed):
    generator = torch.Generator().manual_seed(seed)
    rand = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    query = rand(case.batch, case.seqlen_q, case.num_heads, case.head_dim)
    key, value = rand(2, case.batch, case.seqlen_k, case.num_kv_heads, case.head_dim)
    importance = rand(case.batch, case.importance_heads, case.seqlen_k)
    drift = torch.arange(case.seqlen_k) * 0.1
    importance = {
        "iid": importance,
        "up": importance + drift,
        "down": importance - drift,
        "constant": importance * 0,
        "ties": importance.relu(),
        "some-inf": torch.where(importance > 0, importance, -torch.inf),
        "huge-ties": torch.where(importance > 0, torch.where(importance > 1, 1e30, 1e6), importance),
        "infinite-ties": torch.where(importance > 1, torch.inf, importance),
    }[case.importance]
    padding_mask = None
    if case.padding is not None:
        rows = torch.arange(case.seqlen_k)
        padding_mask = {
            "interior": (torch.rand(1, case.seqlen_k, generator=generator) > 0.3),
            "left-and-empty": torch.stack([rows >= 60, rows < 0]),
        }[case.padding]
        real = padding_mask[:, :, None, None]
        query = torch.where(real[:, -case.seqlen_q :], query, torch.nan)
        key, value = torch.where(real, key, torch.nan), torch.where(real, value, torch.inf)
    tensors = [tensor.to(DEVICE, case.dtype) for tensor in (query, key, value)] + [importance.to(DEVICE)]
    masks = {
        "padding_mask": None if padding_mask is None else padding_mask.to(DEVICE),
        "cu_seqlens": None
        if case.cu_seqlens is None
        else torch.tensor(case.cu_seqlens, dtype=torch.int32, device=DEVICE),
    }
    weights = rand(case.batch, case.seqlen_q, case.num_heads, case.head_dim + 1).to(DEVICE)
    return tensors, masks, weights


def run(case, seed, backend, dtype=None):
    """Returns out, lse and the four gradients, as float64."""
    tensors, masks, weights = make_inputs(case, seed)
    if dtype is not None:
        tensors = [tensor.to(dtype) for tensor in tensors[:3]] + [tensors[3].to(dtype)]
    tensors = [tensor.detach().requires_grad_() for tensor in tensors]
    out, lse = flash_dmattn.dynamic_mask_attention(*tensors, **masks, **case.options, return_lse=True, backend=backend)
    loss = (out.double() * weights[..., :-1]).sum()
    loss = loss + (lse.masked_fill(lse.isneginf(), 0).double() * weights[..., -1].transpose(1, 2)).sum()
    loss.backward()
    gradients = [torch.zeros_like(tensor) if tensor.grad is None else tensor.grad for tensor in tensors]
    return [result.detach().double() for result in (out, lse, *gradients)]


def check(case, seed):
    exact = run(case, seed, "reference", torch.float64)
    same_precision = run(case, seed, "reference")
    for name, expected, rounded, got in zip(NAMES, exact, same_precision, run(case, seed, "triton"), strict=True):
        if name == "lse" and case.importance == "infinite-ties":
            continue  # of the order of the largest float32, and nothing more is promised
        assert torch.equal(got.isneginf(), expected.isneginf()), name
        expected, rounded, got = (t.masked_fill(expected.isneginf(), 0) for t in (expected, rounded, got))
        assert got.isfinite().all(), name
        norm = expected.norm()
        if norm < 1e-6:
            assert got.norm() < 1e-4, name
            continue
        allowed = 2 * (rounded - expected).norm() / norm + ROUNDING[case.dtype]
        assert (got - expected).norm() / norm <= allowed, name


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_kernels_equal_the_reference(case, seed):
    check(case, seed)


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU, reason="needs a CUDA GPU: half precision and large shapes")
@pytest.mark.parametrize("case", GPU_CASES, ids=lambda case: case.name)
def test_kernels_equal_the_reference_in_half_precision(case, seed):
    check(case, seed)


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


def test_an_understated_max_visible_stays_inside_memory():
    query, key, value = torch.randn(3, 1, 600, 1, 16, device=DEVICE)
    visibility = flash_dmattn.select_visible(torch.randn(1, 1, 600, device=DEVICE), keep_window_size=600)
    out = flash_dmattn.interval_attention(query, key, value, None, visibility, max_visible=1, backend="triton")
    assert out.isfinite().all()


@pytest.mark.parametrize("heads", [1, 6], ids=["per-kv-head", "per-query-head"])
def test_deterministic_gradients_are_bitwise_equal(heads, seed):
    case = Case("twice", 1, 130, 130, num_heads=6, importance_heads=heads, options=options(deterministic=True))
    for first, second in zip(run(case, seed, "triton"), run(case, seed, "triton"), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize(
    ("change", "words"),
    [({"dtype": torch.float64}, "float64"), ({"head_dim": 264}, "head dim 264"), ({"num_heads": 33}, "33 query heads")],
    ids=["float64", "head-dim", "group-size"],
)
def test_refusals_name_the_reason(change, words, seed):
    (query, key, value, importance), _, _ = make_inputs(Case("refused", **change), seed)
    with pytest.raises(RuntimeError, match=words):
        flash_dmattn.dynamic_mask_attention(query, key, value, importance, keep_window_size=8, backend="triton")


@pytest.mark.parametrize(("length", "k"), [(1, 0), (7, 2), (1500, 37), (2100, 500)])
def test_order_statistics_equal_those_of_torch(length, k, seed):
    from flash_dmattn import order_statistics
    from flash_dmattn.backends.triton import order_statistics as kernels

    generator = torch.Generator().manual_seed(seed)
    sequence = torch.stack([torch.randperm(length, generator=generator) for _ in range(2)])
    high = torch.arange(length).expand(2, length)
    low = torch.randint(0, length, (2, length), generator=generator).minimum(high)
    expected = order_statistics.kth_smallest_in_ranges(sequence, low, high, k)
    got = kernels.kth_smallest_in_ranges(sequence.to(DEVICE), low.to(DEVICE), high.to(DEVICE), k)
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
