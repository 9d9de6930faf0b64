"""The attention problems that every backend with its own kernels is tested on, and how its results are judged."""

from dataclasses import dataclass, field

import torch

import flash_dmattn

HAS_GPU = torch.cuda.is_available()
DEVICE = "cuda" if HAS_GPU else "cpu"
ROUNDING = {torch.float32: 2e-5, torch.bfloat16: 1.2e-2, torch.float16: 2e-3}
NAMES = ("out", "lse", "dquery", "dkey", "dvalue", "dimportance")


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
    Case("dense-early", importance="early", options=options(keep_window_size=500)),
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
            f"dense-early-{str(dtype)[6:]}",
            seqlen_q=700,
            seqlen_k=700,
            head_dim=128,
            dtype=dtype,
            importance="early",
            options=options(keep_window_size=1024),
        )
        for dtype in (torch.bfloat16, torch.float16)
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
        "early": importance + 300.0 * (torch.arange(case.seqlen_k) < case.seqlen_k // 4),
        "ties": importance.relu(),
        "some-inf": torch.where(importance > 0, importance, -torch.inf),
        "huge-ties": torch.where(importance > 0, torch.where(importance > 1, 1e30, 1e6), importance),
        "infinite-ties": torch.where(importance > 1, torch.inf, importance),
    }[case.importance]
    padding_mask = None
    if case.padding is not None:
        rows = torch.arange(case.seqlen_k)
        padding_mask = {
            "interior": (torch.rand(case.batch, case.seqlen_k, generator=generator) > 0.3),
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


def run(case, seed, backend, dtype=None, gradients=True):
    """Returns out, lse and, if asked, the four gradients, as float64."""
    tensors, masks, weights = make_inputs(case, seed)
    if dtype is not None:
        tensors = [tensor.to(dtype) for tensor in tensors[:3]] + [tensors[3].to(dtype)]
    tensors = [tensor.detach().requires_grad_() for tensor in tensors]
    out, lse = flash_dmattn.dynamic_mask_attention(*tensors, **masks, **case.options, return_lse=True, backend=backend)
    if not gradients:
        return [result.detach().double() for result in (out, lse)]
    loss = (out.double() * weights[..., :-1]).sum()
    loss = loss + (lse.masked_fill(lse.isneginf(), 0).double() * weights[..., -1].transpose(1, 2)).sum()
    loss.backward()
    grads = [torch.zeros_like(tensor) if tensor.grad is None else tensor.grad for tensor in tensors]
    return [result.detach().double() for result in (out, lse, *grads)]


def check(case, seed, backend, gradients=True):
    """Asserts that no result errs more than twice as much as torch in the same precision, plus rounding."""
    exact = run(case, seed, "reference", torch.float64, gradients=gradients)
    same_precision = run(case, seed, "reference", gradients=gradients)
    got_all = run(case, seed, backend, gradients=gradients)
    for name, expected, rounded, got in zip(NAMES[: len(exact)], exact, same_precision, got_all, strict=True):
        if name == "lse" and case.importance == "infinite-ties":
            continue  # of the order of the largest float32, and nothing more is promised
        assert torch.equal(got.isneginf(), expected.isneginf()), name
        expected, rounded, got = (t.masked_fill(expected.isneginf(), 0) for t in (expected, rounded, got))
        assert got.isfinite().all(), name
        norm = expected.norm()
        if norm < 1e-6:
            assert got.norm() < 1e-4, name
            continue
        # Beside 1e6 a float32 logit is a multiple of 1/16, and not of the same 1/16 in every backend.
        slack = 1e-2 if case.importance == "huge-ties" else 0
        allowed = 2 * (rounded - expected).norm() / norm + ROUNDING[case.dtype] + slack
        assert (got - expected).norm() / norm <= allowed, name
