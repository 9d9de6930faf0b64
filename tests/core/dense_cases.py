"""Attention under masks and biases: its definition in float64, the problems, and how a backend's results are judged."""

import math
from dataclasses import dataclass, replace

import torch

from flash_dmattn.dense.attention import dense_attention

from .kernel_cases import DEVICE, ROUNDING

NAMES = ("out", "lse", "dquery", "dkey", "dvalue", "dbias")


@dataclass(frozen=True)
class DenseCase:
    """One call. mask, bias: which dimensions are not broadcast, of "b" (batch), "h" or "k" (query or kv heads), "q"
    and "s" (rows and columns); None for no tensor. hidden: the share of pairs that the mask hides."""

    name: str
    mask: str | None = "bkqs"
    bias: str | None = "bkqs"
    batch: int = 2
    seqlen_q: int = 40
    seqlen_k: int = 70
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 16
    dtype: torch.dtype = torch.float32
    hidden: float = 0.5
    is_causal: bool = False
    softcap: float = 0.0
    deterministic: bool = False
    is_float_mask: bool = False

    def __str__(self):
        return self.name

    def shape(self, dims: str) -> tuple[int, ...]:
        heads = self.num_heads if "h" in dims else self.num_kv_heads if "k" in dims else 1
        batch, seqlen_q, seqlen_k = (
            size if letter in dims else 1
            for letter, size in (("b", self.batch), ("q", self.seqlen_q), ("s", self.seqlen_k))
        )
        return batch, heads, seqlen_q, seqlen_k

    def options(self) -> dict:
        return {"is_causal": self.is_causal, "softcap": self.softcap, "deterministic": self.deterministic}


CASES = [
    DenseCase("kv-heads"),
    DenseCase("query-heads", mask="bhqs", bias="bhqs", is_causal=True),
    DenseCase("one-for-all", mask="qs", bias="qs"),
    DenseCase("one-for-all-deterministic", mask="qs", bias="qs", deterministic=True),
    DenseCase("mask-by-head-bias-by-kv-head", mask="hqs", bias="kqs", softcap=2.0),
    DenseCase("bias-by-key", mask="bkqs", bias="hs"),
    DenseCase("bias-by-key-deterministic", mask="qs", bias="s", deterministic=True),
    DenseCase("bias-by-row", mask="bqs", bias="hq"),
    DenseCase("mask-by-key", mask="bks", bias="hqs"),
    DenseCase("mask-only", bias=None, hidden=0.9),
    DenseCase("bias-only-causal", mask=None, is_causal=True, head_dim=24),
    DenseCase("more-queries-than-keys", seqlen_q=70, seqlen_k=40, is_causal=True, mask=None, bias="hqs"),
    DenseCase("float-mask", is_float_mask=True, num_heads=3, num_kv_heads=1),
    DenseCase("no-group", num_heads=2, mask="bkqs", is_causal=True),
]

GPU_CASES = [
    *(
        DenseCase(
            f"{str(dtype)[6:]}-d{head_dim}-g{group}",
            seqlen_q=500,
            seqlen_k=700,
            num_heads=2 * group,
            head_dim=head_dim,
            dtype=dtype,
            is_causal=group == 4,
            mask="bhqs" if group == 1 else "bkqs",
        )
        for dtype, groups in ((torch.bfloat16, (1, 3, 4)), (torch.float16, (4, 1, 3)))
        for head_dim, group in zip((32, 64, 72, 96, 128, 192, 256), 3 * groups, strict=False)
    ),
    *(
        replace(
            case,
            name=f"large-{case}",
            seqlen_q=7 * case.seqlen_q,
            seqlen_k=7 * case.seqlen_k,
            head_dim=128,
            dtype=torch.bfloat16,
        )
        for case in CASES
    ),
]


def make_inputs(case: DenseCase, seed: int) -> dict[str, torch.Tensor | None]:
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape):
        return torch.randn(*shape, generator=generator)

    query = rand(case.batch, case.seqlen_q, case.num_heads, case.head_dim)
    key, value = rand(2, case.batch, case.seqlen_k, case.num_kv_heads, case.head_dim)
    mask = bias = None
    if case.mask is not None:
        shape = case.shape(case.mask)
        # Some rows see nothing and runs of keys are seen by nobody, so that tiles are empty and full as well.
        mask = torch.rand(shape, generator=generator) >= case.hidden
        rows, columns = torch.arange(shape[2])[:, None], torch.arange(shape[3])
        block = shape[3] // 4
        mask = (mask | ((columns // block == 1) & (rows < shape[2] // 2))) & ~(columns // block == 2)
        mask = mask & (rows % 37 != 3) if shape[2] > 1 else mask
        mask = mask.to(DEVICE, case.dtype if case.is_float_mask else torch.bool)
    if case.bias is not None:
        bias = rand(*case.shape(case.bias)).to(DEVICE, case.dtype)
    tensors = [tensor.to(DEVICE, case.dtype) for tensor in (query, key, value)]
    weights = rand(case.batch, case.seqlen_q, case.num_heads, case.head_dim + 1).to(DEVICE)
    return {"tensors": (*tensors, bias), "mask": mask, "weights": weights}


def definition(query, key, value, mask, bias, *, is_causal=False, softcap=0.0, scale=None, **_):
    """out (B, Sq, H, D) and lse (B, H, Sq): the softmax over what every query sees, written down in full."""
    num_heads, head_dim = query.shape[2:]
    key, value = (x.repeat_interleave(num_heads // key.shape[2], dim=2) for x in (key, value))
    logits = torch.einsum("bihd,bjhd->bhij", query, key) * (head_dim**-0.5 if scale is None else scale)
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)

    def by_head(tensor):
        return tensor.repeat_interleave(num_heads // tensor.shape[1], dim=1)

    if bias is not None:
        logits = logits + by_head(bias)
    visible = torch.ones_like(logits, dtype=torch.bool)
    if mask is not None:
        visible = visible & (by_head(mask) != 0)
    if is_causal:
        visible = visible.tril(logits.shape[-1] - logits.shape[-2])
    sees_any = visible.any(-1, keepdim=True)
    logits = torch.where(visible, logits, -math.inf)
    safe = torch.where(sees_any, logits, 0)
    weights = torch.where(sees_any, safe.softmax(-1), 0)
    lse = torch.where(sees_any[..., 0], safe.logsumexp(-1), -math.inf)
    return torch.einsum("bhij,bjhd->bihd", weights, value), lse


def run(function, case: DenseCase, seed: int, dtype: torch.dtype | None = None) -> list[torch.Tensor]:
    """Returns out, lse and the gradients that there are, as float64."""
    inputs = make_inputs(case, seed)
    tensors = [None if x is None else x.to(dtype or x.dtype).requires_grad_() for x in inputs["tensors"]]
    query, key, value, bias = tensors
    out, lse = function(query, key, value, inputs["mask"], bias, **case.options())
    weights = inputs["weights"].double()
    loss = (out.double() * weights[..., :-1]).sum()
    loss = loss + (lse.masked_fill(lse.isneginf(), 0).double() * weights[..., -1].transpose(1, 2)).sum()
    grads = torch.autograd.grad(loss, [x for x in tensors if x is not None])
    return [result.detach().double() for result in (out, lse, *grads)]


def check(case: DenseCase, seed: int, backend: str) -> None:
    """Asserts that no result errs more than twice as much as torch in the same precision, plus rounding."""

    def attention_of(name):
        return lambda *tensors, **options: dense_attention(*tensors, **options, backend=name)

    exact = run(definition, case, seed, torch.float64)
    rounded = run(attention_of("reference"), case, seed)
    for name, expected, near, got in zip(NAMES, exact, rounded, run(attention_of(backend), case, seed), strict=False):
        assert torch.equal(got.isneginf(), expected.isneginf()), name
        expected, near, got = (t.masked_fill(expected.isneginf(), 0) for t in (expected, near, got))
        assert got.isfinite().all(), name
        allowed = 2 * (near - expected).norm() / expected.norm() + ROUNDING[case.dtype]
        error = (got - expected).norm() / expected.norm()
        assert error <= allowed, f"{name}: {error:.2e} > {allowed:.2e}"
