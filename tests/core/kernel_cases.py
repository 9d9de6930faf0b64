"""Longer attention problems, for backends with kernels of their own, and how the results of these are judged."""

import math

import torch

import flash_dmattn

from .attention_cases import AttentionCase, documents, padding

HAS_GPU = torch.cuda.is_available()
DEVICE = "cuda" if HAS_GPU else "cpu"
ROUNDING = {torch.float32: 2e-5, torch.bfloat16: 1.2e-2, torch.float16: 2e-3}
NAMES = ("out", "lse", "dquery", "dkey", "dvalue", "dimportance")


def options(**changes):
    return {"keep_window_size": 32, "num_sink_tokens": 2, "local_window_size": 8, **changes}


def tiled(name, **changes):
    """A case of more than one tile of queries and more than one epoch."""
    shape = {"batch": 1, "seqlen_q": 150, "seqlen_k": 150, "num_heads": 2, "options": options()}
    return AttentionCase(name, **{**shape, **changes})


def long_blocks(seqlen, size, text=5):
    """Blocks of `size` tokens, one after another, with some text before each."""
    place = torch.arange(seqlen)
    return flash_dmattn.find_blocks(torch.where(place % (size + text) < text, -1, place // (size + text))[None])


def scattered(batch, seqlen):
    """bool (B, Sk), padding between the tokens."""
    return torch.rand(batch, seqlen, generator=torch.Generator().manual_seed(seqlen)) > 0.3


PACKED = documents(3, 0, 47, 1, 99)

TILED_CASES = [
    *(tiled(f"importance-{kind}", importance=kind) for kind in ("iid", "up", "down", "constant", "ties", "some-inf")),
    tiled("top-keys-only", importance="up", options=options(num_sink_tokens=0, local_window_size=0)),
    tiled("sinks-and-window-only", options=options(num_sink_tokens=4, local_window_size=28)),
    tiled("fewer-queries", seqlen_q=37, seqlen_k=200),
    tiled("one-more-than-a-tile", seqlen_q=129, seqlen_k=129),
    tiled("per-query-head", num_heads=4, num_kv_heads=2, num_importance_heads=4),
    tiled("group-of-three", num_heads=6, num_kv_heads=2),
    tiled("no-group", num_kv_heads=2),
    tiled("dense", options=options(keep_window_size=500)),
    tiled("dense-group-of-three", num_heads=6, num_kv_heads=2, options=options(keep_window_size=150)),
    tiled("dense-fewer-queries", seqlen_q=37, seqlen_k=200, options=options(keep_window_size=200)),
    tiled("dense-some-inf", importance="some-inf", options=options(keep_window_size=500)),
    tiled("dense-early", importance="early", options=options(keep_window_size=500)),
    tiled("dense-no-bias", options=options(keep_window_size=500, add_importance_bias=False)),
    tiled("dense-softcap", num_heads=4, num_importance_heads=4, options=options(keep_window_size=500, softcap=2.0)),
    *(
        tiled(f"{dense}{kind}", importance=kind, options=options(keep_window_size=size))
        for kind in ("huge-ties", "infinite-ties")
        for dense, size in (("", 32), ("dense-", 500))
    ),
    tiled("softcap", options=options(softcap=2.0)),
    tiled("no-bias", options=options(add_importance_bias=False)),
    tiled("not-causal", options=options(is_causal=False, local_window_size=0)),
    tiled("sliding-window", options=options(sliding_window=20)),
    tiled("deterministic", options=options(deterministic=True)),
    tiled("odd-head-dim", head_dim=24),
    tiled("padding-interior", options=options(padding_mask=scattered(1, 150))),
    tiled(
        "padding-left-and-empty-row",
        batch=2,
        options=options(padding_mask=padding("0" * 60 + "1" * 90, "0" * 150)),
    ),
    tiled("packed", options=options(cu_seqlens=PACKED)),
    tiled("blocks", seqlen_q=260, seqlen_k=260, options=options(local_window_size=24, blocks=long_blocks(260, 24))),
    tiled(
        "blocks-of-fewer-queries",
        seqlen_q=70,
        seqlen_k=200,
        num_heads=6,
        num_kv_heads=2,
        options=options(local_window_size=24, blocks=long_blocks(200, 24)),
    ),
    tiled("one-long-block", options=options(keep_window_size=150, local_window_size=0, blocks=long_blocks(150, 140))),
    tiled("packed-not-causal", options=options(is_causal=False, local_window_size=0, cu_seqlens=PACKED)),
]

GPU_CASES = [
    *(
        tiled(
            f"{str(dtype)[6:]}-d{head_dim}-g{group}",
            batch=2,
            seqlen_q=1500,
            seqlen_k=1500,
            num_heads=2 * group,
            num_kv_heads=2,
            head_dim=head_dim,
            dtype=dtype,
            options=options(keep_window_size=256, local_window_size=100),
        )
        for dtype in (torch.bfloat16, torch.float16)
        for head_dim in (32, 64, 96, 128, 192, 256)
        for group in (1, 3, 4, 8)
    ),
    *(
        tiled(
            f"dense-d{head_dim}",
            seqlen_q=700,
            seqlen_k=700,
            num_heads=8,
            num_kv_heads=2,
            head_dim=head_dim,
            dtype=torch.bfloat16,
            options=options(keep_window_size=1024),
        )
        for head_dim in (32, 64, 96, 128, 192, 256)
    ),
    *(
        tiled(
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
        tiled(
            f"long-{kind}",
            seqlen_q=4099,
            seqlen_k=4099,
            num_heads=8,
            num_kv_heads=2,
            head_dim=128,
            dtype=torch.bfloat16,
            importance=kind,
            options=options(keep_window_size=1024, local_window_size=local),
        )
        for kind, local in (("iid", 0), ("up", 0), ("down", 512), ("constant", 768))
    ),
    *(
        tiled(
            f"keys-d{head_dim}-values-d{value_dim}-hi{lanes}",
            seqlen_q=1500,
            seqlen_k=1500,
            num_heads=4,
            num_kv_heads=4,
            num_importance_heads=lanes,
            head_dim=head_dim,
            value_dim=value_dim,
            dtype=torch.bfloat16,
            options=options(keep_window_size=256, local_window_size=100),
        )
        for head_dim, value_dim in ((192, 128), (96, 64), (64, 128))
        for lanes in (4, 1)
    ),
    *(
        tiled(
            f"blocks-{size}-d{head_dim}{'-deterministic' if more else ''}",
            seqlen_q=3000,
            seqlen_k=3000,
            num_heads=8,
            num_kv_heads=2,
            head_dim=head_dim,
            dtype=torch.bfloat16,
            options=options(keep_window_size=512, local_window_size=300, blocks=long_blocks(3000, size), **more),
        )
        for size in (1, 7, 256, 300)
        for head_dim in (64, 128, 256)
        for more in ({}, {"deterministic": True})
    ),
    *(
        tiled(f"length-{length}", seqlen_q=length, seqlen_k=length, head_dim=128, dtype=torch.bfloat16)
        for length in (1, 127, 128, 129, 1000)
    ),
]


def make_inputs(case, seed):
    """Returns a case's tensors, its options, and weights of out and lse in a loss; padding holds garbage."""
    generator = torch.Generator().manual_seed(seed)
    query, key, value, importance = case.inputs(generator)
    if "padding_mask" in case.options:
        real = case.options["padding_mask"][:, :, None, None]
        query = torch.where(real[:, -case.seqlen_q :], query, torch.nan)
        key, value = torch.where(real, key, torch.nan), torch.where(real, value, torch.inf)
    weights = torch.randn(case.batch, case.seqlen_q, case.num_heads, value.shape[3] + 1, generator=generator)
    chosen = {name: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for name, x in case.options.items()}
    if "blocks" in chosen:
        chosen["blocks"] = chosen["blocks"]._replace(start=chosen["blocks"].start.to(DEVICE))
    return [tensor.to(DEVICE) for tensor in (query, key, value, importance)], chosen, weights.to(DEVICE)


def run(case, seed, backend, dtype=None, gradients=True):
    """Returns out, lse and, if asked, the four gradients, as float64."""
    tensors, chosen, weights = make_inputs(case, seed)
    if dtype is not None:
        tensors = [tensor.to(dtype) for tensor in tensors[:3]] + [tensors[3].to(dtype)]
    tensors = [tensor.detach().requires_grad_() for tensor in tensors]
    out, lse = flash_dmattn.dynamic_mask_attention(*tensors, **chosen, return_lse=True, backend=backend)
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
        if name == "lse" and (case.importance == "infinite-ties" or math.inf in case.special):
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
