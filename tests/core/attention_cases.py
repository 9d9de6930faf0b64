"""The attention problems on which the reference is compared with its definition, and the kernels with the reference."""

import math
from dataclasses import dataclass, field

import torch

from flash_dmattn import find_blocks


@dataclass(frozen=True)
class AttentionCase:
    """One call of `dynamic_mask_attention`: shapes, importance and options.

    num_importance_heads: None: num_kv_heads. value_dim: None: head_dim. importance: a name of `IMPORTANCE`. special:
    numbers, each of which stands in place of about every seventh importance. strided: no dimension is where it would be
    by itself.
    """

    name: str
    batch: int = 2
    seqlen_q: int = 23
    seqlen_k: int = 23
    num_heads: int = 3
    num_kv_heads: int = 1
    num_importance_heads: int | None = None
    head_dim: int = 16
    value_dim: int | None = None
    dtype: torch.dtype = torch.float32
    importance_dtype: torch.dtype = torch.float32
    importance: str = "iid"
    strided: bool = False
    special: list = field(default_factory=list)
    options: dict = field(default_factory=lambda: {"keep_window_size": 7})

    def __str__(self):
        return self.name

    def inputs(self, generator=None):
        """query, key, value and importance, drawn from the generator, or else from the global one."""
        num_lanes = self.num_importance_heads or self.num_kv_heads
        query = torch.randn(self.batch, self.seqlen_q, self.num_heads, self.head_dim, generator=generator)
        key, value = torch.randn(2, self.batch, self.seqlen_k, self.num_kv_heads, self.head_dim, generator=generator)
        if self.value_dim is not None:
            value = torch.randn(*value.shape[:3], self.value_dim, generator=generator)
        noise = torch.randn(self.batch, num_lanes, self.seqlen_k, generator=generator)
        importance = IMPORTANCE[self.importance](noise, torch.arange(self.seqlen_k))
        for number in self.special:
            importance[torch.rand(importance.shape, generator=generator) < 0.15] = number
        found = [
            query.to(self.dtype),
            key.to(self.dtype),
            value.to(self.dtype),
            importance.to(self.importance_dtype),
        ]
        return [as_strided_view(x) if self.strided else x for x in found]


IMPORTANCE = {
    "iid": lambda noise, row: noise,
    "up": lambda noise, row: noise + 0.1 * row,
    "down": lambda noise, row: noise - 0.1 * row,
    "constant": lambda noise, row: noise * 0,
    "early": lambda noise, row: noise + 300.0 * (row < len(row) // 4),
    "ties": lambda noise, row: noise.relu(),
    "some-inf": lambda noise, row: torch.where(noise > 0, noise, -torch.inf),
    "huge-ties": lambda noise, row: torch.where(noise > 0, torch.where(noise > 1, 1e30, 1e6), noise),
    "infinite-ties": lambda noise, row: torch.where(noise > 1, torch.inf, noise),
}
"""How the importance is distributed, from normal noise (B, Hi, Sk) and the numbers of the rows."""


def as_strided_view(x):
    """The same numbers with a last stride of 2 and the middle dimensions swapped in memory."""
    swapped = x.transpose(1, 2)
    return torch.stack([swapped, swapped * math.nan], -1)[..., 0].transpose(1, 2)


def documents(*lengths):
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)


def padding(*rows):
    """bool (B, Sk) from strings of 1 (real) and 0."""
    return torch.tensor([[letter == "1" for letter in row] for row in rows])


def window(w, s=0, r=0, **more):
    return {"keep_window_size": w, "num_sink_tokens": s, "local_window_size": r, **more}


def images(*rows, **places):
    """Blocks from strings: letters that repeat are a block, dots are text."""
    return find_blocks(
        torch.tensor([[-1 if letter == "." else ord(letter) for letter in row] for row in rows]), **places
    )


PACKED = {"batch": 1, "seqlen_q": 30, "seqlen_k": 30}
PADDED_ROWS = padding("00001111" * 2 + "1111101", "1" * 4 + "0" + "1" * 15 + "000")
DOUBLE = {"dtype": torch.float64, "importance_dtype": torch.float64}

CASES = [
    AttentionCase("plain"),
    AttentionCase("one-head", num_heads=1),
    AttentionCase("group-of-1", num_heads=3, num_kv_heads=3),
    AttentionCase("group-of-4", num_heads=8, num_kv_heads=2, options=window(6, 1, 2)),
    AttentionCase("importance-per-query-head", num_heads=6, num_kv_heads=2, num_importance_heads=6),
    AttentionCase("importance-of-all-heads", num_heads=6, num_kv_heads=3, num_importance_heads=1),
    AttentionCase("values-shorter", num_heads=4, num_kv_heads=2, head_dim=12, value_dim=8, options=window(7, 1, 2)),
    AttentionCase("values-longer-all-keys-fit", head_dim=8, value_dim=20, options=window(100)),
    AttentionCase(
        "values-shorter-importance-of-all-heads",
        num_heads=2,
        num_kv_heads=2,
        num_importance_heads=1,
        head_dim=24,
        value_dim=16,
        options=window(9, 2, 4, softcap=2.0),
    ),
    AttentionCase("w=1", options=window(1)),
    AttentionCase("all-keys-fit", options=window(100)),
    AttentionCase("sinks-and-local-window", options=window(9, 2, 4)),
    AttentionCase("no-competition", options=window(9, 2, 7)),
    AttentionCase("sliding-window", options=window(9, 1, sliding_window=11)),
    AttentionCase("not-causal", options=window(6, 2, is_causal=False)),
    AttentionCase("last-queries", seqlen_q=5, seqlen_k=31, options=window(9, 2, 4)),
    AttentionCase("one-query", seqlen_q=1, seqlen_k=31),
    AttentionCase("one-key", seqlen_q=1, seqlen_k=1),
    AttentionCase("no-token", seqlen_q=0, seqlen_k=0),
    AttentionCase("longer-than-a-block", batch=1, seqlen_q=150, seqlen_k=150, num_heads=1, options=window(40, 2, 9)),
    AttentionCase("head-dim-1", head_dim=1),
    AttentionCase("head-dim-5", head_dim=5),
    AttentionCase("head-dim-33", head_dim=33),
    AttentionCase("head-dim-80", head_dim=80),
    AttentionCase("scale-and-softcap", options=window(7, softmax_scale=0.7, softcap=1.5)),
    AttentionCase("no-bias", options=window(7, add_importance_bias=False)),
    AttentionCase("no-bias-softcap", options=window(7, add_importance_bias=False, softcap=2.0)),
    AttentionCase("left-padding", options=window(7, 1, 2, padding_mask=padding("0" * 9 + "1" * 14, "1" * 23))),
    AttentionCase("right-padding", options=window(7, 1, 2, padding_mask=padding("1" * 20 + "000", "1" + "0" * 22))),
    AttentionCase(
        "interior-padding",
        options=window(5, 1, 2, padding_mask=padding("110" * 7 + "11", "0" + "1001101" * 3 + "1")),
    ),
    AttentionCase("a-row-of-padding", options=window(7, padding_mask=padding("0" * 23, "1" * 23))),
    AttentionCase(
        "padding-last-queries",
        seqlen_q=6,
        options=window(7, 1, padding_mask=padding("0" * 10 + "1" * 13, "1" * 19 + "0" * 4)),
    ),
    AttentionCase(
        "padding-not-causal",
        options=window(7, 1, is_causal=False, padding_mask=padding("1" * 20 + "000", "011" + "1" * 20)),
    ),
    AttentionCase("packed", **PACKED, options=window(6, 1, 2, cu_seqlens=documents(7, 1, 0, 16, 6))),
    AttentionCase("packed-one-document", **PACKED, options=window(6, cu_seqlens=documents(30), max_seqlen=30)),
    AttentionCase("packed-not-causal", **PACKED, options=window(4, 1, is_causal=False, cu_seqlens=documents(9, 1, 20))),
    AttentionCase(
        "packed-and-padded",
        **PACKED,
        options=window(
            4, 1, 1, cu_seqlens=documents(12, 18), padding_mask=padding("1" * 9 + "000" + "1" * 11 + "0" * 7)
        ),
    ),
    AttentionCase(
        "blocks", options=window(9, 1, 5, blocks=images("..aaaaa.bb" + "." * 13, "cccddddd" + ".....e" * 2 + "fff"))
    ),
    AttentionCase(
        "blocks-from-which-the-last-queries-come",
        seqlen_q=6,
        num_heads=4,
        num_kv_heads=2,
        options=window(9, 0, 6, softcap=2.0, blocks=images("." * 14 + "aaaaaa" + "...", "b" * 5 + "." * 14 + "cccc")),
    ),
    AttentionCase("blocks-all-keys-fit", options=window(30, blocks=images("." + "a" * 20 + "..", "a" * 23))),
    AttentionCase(
        "blocks-and-a-sliding-window",
        options=window(9, 1, 5, sliding_window=6, blocks=images("." * 8 + "aaaaabbbbbccccc", "ab" * 11 + "c")),
    ),
    AttentionCase(
        "blocks-and-padding",
        options=window(
            8,
            1,
            5,
            padding_mask=PADDED_ROWS,
            blocks=images("a" * 8 + "." * 15, "..bbbbbb.cccc" + "." * 10, padding_mask=PADDED_ROWS),
        ),
    ),
    AttentionCase(
        "blocks-in-packed-documents",
        **PACKED,
        options=window(
            7,
            1,
            4,
            cu_seqlens=documents(7, 1, 22),
            blocks=images(".aaaabbbbcc" + "." * 19, cu_seqlens=documents(7, 1, 22)),
        ),
    ),
    AttentionCase("minus-infinity", special=[-math.inf], options=window(12)),
    AttentionCase("mostly-minus-infinity", special=[-math.inf] * 12, options=window(4)),
    AttentionCase("nan", special=[math.nan], options=window(12)),
    AttentionCase("minus-infinity-no-bias", special=[-math.inf], options=window(12, add_importance_bias=False)),
    AttentionCase("infinity", special=[math.inf], options=window(12)),
    AttentionCase("strided", strided=True, num_heads=4, num_kv_heads=2),
    AttentionCase("bfloat16", dtype=torch.bfloat16, options=window(9, 2, 4)),
    AttentionCase("bfloat16-importance-too", dtype=torch.bfloat16, importance_dtype=torch.bfloat16),
    AttentionCase("float16", dtype=torch.float16, options=window(9, 2, 4)),
    AttentionCase("float32-importance-float64", importance_dtype=torch.float64),
    AttentionCase("float64-importance-float32", dtype=torch.float64),
    AttentionCase("float64", **DOUBLE, options=window(9, 2, 4, softcap=5.0)),
    AttentionCase("float64-group-of-4", **DOUBLE, num_heads=4, options=window(5, 1)),
]

TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def assert_close(name, got, expected, dtype):
    """Differences are judged against the largest expected number, or 1; infinities must agree exactly."""
    assert got.shape == expected.shape, f"{name}: {got.shape} instead of {expected.shape}"
    got, finite = got.double(), expected.isfinite()
    assert torch.equal(got.isfinite(), finite) and torch.equal(got[~finite], expected[~finite]), f"{name}: not finite"
    if finite.any():
        error = (got - expected)[finite].abs().max() / expected[finite].abs().max().clamp(min=1)
        assert error <= TOLERANCES[dtype], f"{name}: relative error {error:.1e}"
