"""A step over fixed slots: its output is that of attention over the whole sequence, its slots hold what is needed."""

import importlib.util
import os
from dataclasses import dataclass, replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from flash_dmattn import interval_attention, select_visible
from flash_dmattn import slots as slots_module
from flash_dmattn.slots import decode_step, decode_step_op, make_slots, refresh_victims

if torch.cuda.is_available():
    DEVICE = "cuda"
else:
    DEVICE = "cpu"
NO_TRITON = importlib.util.find_spec("triton") is None or (
    DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET", "0") in ("", "0")
)
BACKENDS_AND_DTYPES = [
    pytest.param("reference", torch.float64, id="reference-float64"),
    pytest.param("reference", torch.bfloat16, id="reference-bfloat16"),
    pytest.param(
        "triton",
        torch.float32,
        id="triton-float32",
        marks=pytest.mark.skipif(
            NO_TRITON, reason="Triton is not installed, or neither a GPU nor its interpreter is used"
        ),
    ),
]


@dataclass(frozen=True)
class Case:
    """w, s, r and the sliding window; lengths and heads are small, because Triton's interpreter is slow."""

    w: int
    s: int = 0
    r: int = 0
    sliding_window: int | None = None
    length: int = 12
    head_dim: int = 8
    value_dim: int | None = None
    group_size: int = 2
    num_kv_heads: int = 2
    per_query_head: bool = False
    is_padded: bool = False
    softcap: float = 0.0
    add_importance_bias: bool = True
    importance: str = "ties"

    @property
    def windows(self):
        return {"num_sink_tokens": self.s, "local_window_size": self.r, "sliding_window": self.sliding_window}


CASES = {
    "top": Case(4),
    "sinks": Case(5, 3),
    "sinks-local": Case(5, 2, 2, is_padded=True),
    "all-local": Case(6, 0, 6),
    "all-sinks": Case(3, 3),
    "no-contest": Case(8, 3, 5, is_padded=True),
    "one": Case(1, is_padded=True),
    "window": Case(5, 1, 2, sliding_window=7, is_padded=True),
    "long-window": Case(5, sliding_window=2**31 - 1),
    "never-full": Case(20, 2, 3),
    "even-blocks": Case(32, 1, 8, length=38, num_kv_heads=1, group_size=1, head_dim=16, is_padded=True),
    "several-blocks": Case(20, 4, 8, length=30, num_kv_heads=1),
    "query-heads": Case(5, 1, 2, per_query_head=True, head_dim=12),
    "softcap": Case(5, softcap=2.0),
    "no-bias": Case(5, add_importance_bias=False, importance="special"),
    "special": Case(5, 1, importance="special", is_padded=True),
    "values-shorter": Case(5, 1, 2, head_dim=24, value_dim=16, is_padded=True),
    "values-longer": Case(20, 4, 8, length=30, num_kv_heads=1, head_dim=8, value_dim=20),
    "group-of-three": Case(5, 0, 2, group_size=3, num_kv_heads=1, head_dim=20),
}


def draw(case, dtype):
    """query, key, value, importance, padding mask of a whole sequence; padded rows are full of NaN and inf."""
    heads = case.num_kv_heads * case.group_size
    importance_heads = heads if case.per_query_head else case.num_kv_heads
    query = torch.randn(2, case.length, heads, case.head_dim).to(DEVICE, dtype)
    key, value = torch.randn(2, 2, case.length, case.num_kv_heads, case.head_dim).to(DEVICE, dtype)
    if case.value_dim is not None:
        value = torch.randn(*value.shape[:3], case.value_dim).to(DEVICE, dtype)
    importance = torch.randint(-2, 3, (2, importance_heads, case.length)).float().to(DEVICE)
    if case.importance == "special":
        special = torch.tensor([torch.nan, torch.inf, -torch.inf, -0.0, 0.0, 1.0], device=DEVICE)
        importance = special[torch.randint(0, 6, importance.shape)]
    mask = torch.ones(2, case.length, dtype=torch.bool, device=DEVICE)
    if case.is_padded:
        mask = torch.rand(2, case.length, device=DEVICE) < 0.7
    return query, key, value, importance, mask


def expected_output(case, query, key, value, importance, mask, **options):
    visibility = select_visible(importance, keep_window_size=case.w, padding_mask=mask, **case.windows)
    rows = torch.where(mask, torch.arange(case.length, device=DEVICE), -1).int()
    exact = torch.float64 if query.dtype == torch.float64 else torch.float32
    return interval_attention(
        *(tensor.to(exact) for tensor in (query, key, value)),
        importance,
        visibility,
        query_positions=rows,
        softcap=case.softcap,
        add_importance_bias=case.add_importance_bias,
        backend="reference",
        **options,
    )


@pytest.fixture
def small_programs(monkeypatch):
    """Programs of 16 slots, so that few slots are several programs."""
    if not NO_TRITON:
        from flash_dmattn.backends.triton import decode_kernel
        from flash_dmattn.backends.triton.configs import DecodeConfig

        monkeypatch.setattr(decode_kernel, "decode_config", lambda *_: DecodeConfig(16, 16, 2, 1))


def steps(case, slots, query, key, value, importance, mask, backend, **options):
    for t in range(case.length):
        row = slice(t, t + 1)
        yield decode_step(
            query[:, row],
            key[:, row],
            value[:, row],
            importance[:, :, row],
            slots,
            padding_mask=mask[:, row] if case.is_padded else None,
            softcap=case.softcap,
            add_importance_bias=case.add_importance_bias,
            backend=backend,
            **case.windows,
            **options,
        )


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize(("backend", "dtype"), BACKENDS_AND_DTYPES)
def test_token_by_token_equals_one_pass(case, backend, dtype, small_programs):
    query, key, value, importance, mask = inputs = draw(case, dtype)
    expected = expected_output(case, *inputs)
    for states in (query, key, value):
        states[~mask] = torch.tensor([torch.nan, torch.inf], device=DEVICE, dtype=dtype).repeat(states.shape[3] // 2)
    slots = make_slots(2, importance.shape[1], case.w, case.head_dim, dtype, DEVICE, case.value_dim)
    found = torch.cat(list(steps(case, slots, *inputs, backend)), dim=1)
    tolerance = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 1e-2}[dtype]
    torch.testing.assert_close(found.to(expected.dtype), expected, atol=tolerance, rtol=tolerance)
    assert torch.equal(slots.lengths, mask.sum(1, keepdim=True).expand_as(slots.lengths))
    assert not slots.arrivals.any()


def by_position(slots):
    """Positions, importances, keys and values in the order of the positions: slots have none."""
    order = slots.positions.argsort(-1)
    rows = order.unsqueeze(-1).expand_as(slots.keys)
    states = (slots.positions.gather(2, order), slots.importance.gather(2, order))
    return *states, slots.keys.gather(2, rows), slots.values.gather(2, rows)


@pytest.mark.skipif(NO_TRITON, reason="Triton is not installed, or neither a GPU nor its interpreter is used")
@pytest.mark.parametrize("name", ["sinks-local", "several-blocks"])
def test_engines_keep_the_same_keys(name, small_programs):
    case = CASES[name]
    inputs = draw(case, torch.float32)
    ours, theirs = (make_slots(2, inputs[3].shape[1], case.w, case.head_dim, torch.float32, DEVICE) for _ in range(2))
    every_step = zip(steps(case, ours, *inputs, "triton"), steps(case, theirs, *inputs, "reference"), strict=True)
    for out, expected in every_step:
        torch.testing.assert_close(out, expected, atol=2e-5, rtol=2e-5)
        assert all(map(torch.equal, by_position(ours), by_position(theirs)))
        victims = [slots.positions.gather(2, slots.victims.long().unsqueeze(-1)) for slots in (ours, theirs)]
        assert torch.equal(*victims)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA GPU: these are the programs that batches of many heads get")
@pytest.mark.parametrize(
    ("batch", "head_dim", "value_dim"),
    [(1, 128, 128), (1, 64, 64), (4, 128, 128), (16, 128, 128), (16, 64, 64), (1, 192, 128), (16, 192, 128)],
)
@torch.no_grad()
def test_engines_agree_at_the_sizes_of_models(batch, head_dim, value_dim):
    """Full slots of 2048, 32 query heads over 8 kv heads, bfloat16: outputs, kept keys and next victims."""
    windows = {"num_sink_tokens": 4, "local_window_size": 1536}
    ours, theirs = (make_slots(batch, 8, 2048, head_dim, torch.bfloat16, DEVICE, value_dim) for _ in range(2))
    for state in ours[:3]:
        state.normal_()
    ours.positions.copy_(torch.rand(batch, 8, 10000, device=DEVICE).argsort(-1)[..., :2048])
    ours.lengths.fill_(10000)
    refresh_victims(ours, **windows)
    for state, other in zip(ours, theirs, strict=True):
        other.copy_(state)
    for _ in range(3):
        query = torch.randn(batch, 1, 32, head_dim, device=DEVICE, dtype=torch.bfloat16)
        key = torch.randn(batch, 1, 8, head_dim, device=DEVICE, dtype=torch.bfloat16)
        value = torch.randn(batch, 1, 8, value_dim, device=DEVICE, dtype=torch.bfloat16)
        token = (query, key, value, torch.randn(batch, 8, 1, device=DEVICE))
        out = decode_step(*token, ours, **windows, backend="triton")
        expected = decode_step(*token, theirs, **windows, backend="reference")
        torch.testing.assert_close(out, expected, atol=2e-2, rtol=2e-2)
        assert all(map(torch.equal, ours, theirs))


@pytest.mark.parametrize("name", ["sinks-local", "several-blocks", "query-heads"])
@pytest.mark.parametrize(("backend", "dtype"), BACKENDS_AND_DTYPES)
def test_rows_of_more_slots(name, backend, dtype, small_programs):
    """Two tokens, whose slots are rows 3 and 1 of 5: as with slots of their own, and no other row is touched."""
    case = CASES[name]
    inputs = draw(case, dtype)
    own, pool = (make_slots(n, inputs[3].shape[1], case.w, case.head_dim, dtype, DEVICE) for n in (2, 5))
    untouched = [0, 2, 4]
    for state in pool:
        state[untouched] = 7
    rows = torch.tensor([3, 1], dtype=torch.int32, device=DEVICE)
    expected = list(steps(case, own, *inputs, backend))
    for out, found in zip(expected, steps(case, pool, *inputs, backend, rows=rows), strict=True):
        assert torch.equal(found, out)
    for state, other in zip(own, pool, strict=True):
        assert torch.equal(state, other[rows.long()])
        assert (other[untouched] == 7).all()


@pytest.mark.parametrize("name", ["sinks-local", "several-blocks", "values-longer"])
@pytest.mark.parametrize(("backend", "dtype"), BACKENDS_AND_DTYPES)
def test_rows_without_a_token(name, backend, dtype, small_programs):
    """Around two tokens three places without one, full of NaN: output 0, lse -inf, and no row changes."""
    case, places = CASES[name], [3, 1]
    *inputs, mask = draw(case, dtype)
    sizes = inputs[3].shape[1], case.w, case.head_dim, dtype, DEVICE, case.value_dim
    own, pool, empty = (make_slots(n, *sizes) for n in (2, 3, 1))
    padded = [torch.full((5, *states.shape[1:]), torch.nan, dtype=states.dtype, device=DEVICE) for states in inputs]
    for states, wide in zip(inputs, padded, strict=True):
        wide[places] = states
    wide_mask = torch.ones(5, case.length, dtype=torch.bool, device=DEVICE)
    wide_mask[places] = mask
    rows = torch.tensor([-1, 0, -1, 2, -1], dtype=torch.int32, device=DEVICE)
    others = [0, 2, 4]
    for expected, found in zip(
        steps(case, own, *inputs, mask, backend, return_lse=True),
        steps(case, pool, *padded, wide_mask, backend, rows=rows, return_lse=True),
        strict=True,
    ):
        assert all(torch.equal(one, other[places]) for one, other in zip(expected, found, strict=True))
        assert not found[0][others].any() and (found[1][others] == -torch.inf).all()
    for state, other, nothing in zip(own, pool, empty, strict=True):
        assert torch.equal(state, other[rows[places].long()]) and torch.equal(other[1:2], nothing)
    every = [state.clone() for state in pool]
    token = (*(states[:, :1] for states in padded[:3]), padded[3][:, :, :1])
    out = decode_step(*token, pool, rows=torch.full_like(rows, -1), backend=backend, **case.windows)
    assert not out.any() and all(map(torch.equal, every, pool))


@pytest.mark.parametrize("backend", ["reference"] if NO_TRITON else ["reference", "triton"])
@pytest.mark.parametrize("name", ["sinks-local", "several-blocks", "values-longer"])
def test_lse_is_that_of_one_pass(name, backend, small_programs):
    """-inf for a row without a token."""
    case = CASES[name]
    inputs = draw(case, torch.float32)
    slots = make_slots(2, inputs[3].shape[1], case.w, case.head_dim, torch.float32, DEVICE, case.value_dim)
    found = [lse for _, lse in steps(case, slots, *inputs, backend, return_lse=True)]
    _, expected = expected_output(case, *inputs, return_lse=True)
    torch.testing.assert_close(torch.cat(found, dim=2), expected, atol=2e-5, rtol=2e-5)


def test_strided_tokens():
    """As a model's projections give them: heads before the token, cut out of one tensor."""
    case = Case(5, 1, 2)
    query, key, value, importance, mask = draw(case, torch.float32)
    wide = torch.cat([query, key, value], dim=2).transpose(1, 2).contiguous().transpose(1, 2)
    pieces = wide.split([4, 2, 2], dim=2)
    assert not pieces[0].is_contiguous()
    for backend in ["reference"] if NO_TRITON else ["reference", "triton"]:
        slots = make_slots(2, 2, case.w, case.head_dim, torch.float32, DEVICE)
        wide_importance = importance.transpose(1, 2).contiguous().transpose(1, 2)
        found = torch.cat(list(steps(case, slots, *pieces, wide_importance, mask, backend)), dim=1)
        expected = expected_output(case, query, key, value, importance, mask)
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=2e-5)


def arguments(**changes):
    token = {
        "query": torch.zeros(2, 1, 4, 8),
        "key": torch.zeros(2, 1, 2, 8),
        "value": torch.zeros(2, 1, 2, 8),
        "importance": torch.zeros(2, 2, 1),
        "slots": make_slots(2, 2, 5, 8, torch.float32, "cpu"),
    }
    return {**token, **changes}


def fewer_importances():
    slots = make_slots(2, 2, 5, 8, torch.float32, "cpu")
    return slots._replace(importance=slots.importance[:, :, :4])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"query": torch.zeros(2, 2, 4, 8), "key": torch.zeros(2, 2, 2, 8)}, "value must have key's shape"),
        (
            {
                "query": torch.zeros(2, 2, 4, 8),
                "key": torch.zeros(2, 2, 2, 8),
                "value": torch.zeros(2, 2, 2, 8),
                "importance": torch.zeros(2, 2, 2),
            },
            "query and key must hold one token, got 2 and 2",
        ),
        ({"slots": make_slots(3, 2, 5, 8, torch.float32, "cpu")}, r"slots must have .* \(2, 2, 8\), got \(3, 2, 8\)"),
        ({"slots": make_slots(2, 2, 5, 8, torch.bfloat16, "cpu")}, "slots.keys must be torch.float32 on"),
        ({"slots": fewer_importances()}, r"slots.importance must be .* the shape \(2, 2, 5\), got .* \(2, 2, 4\)"),
        ({"importance": torch.zeros(2, 4, 1)}, r"slots must have .* \(2, 4, 8\), got \(2, 2, 8\)"),
        ({"padding_mask": torch.ones(2, 2, dtype=torch.bool)}, r"padding_mask must be bool of shape \(2, 1\)"),
        ({"padding_mask": torch.ones(2, 1)}, "padding_mask must be bool .* got torch.float32"),
        ({"rows": torch.zeros(2)}, r"rows must be int32 of shape \(2,\) .* got torch.float32"),
        ({"rows": torch.zeros(3, dtype=torch.int32)}, r"rows must be int32 of shape \(2,\) .* got torch.int32 \(3,\)"),
        ({"rows": torch.tensor([1, 1], dtype=torch.int32)}, r"rows must be different .* 0 to 1, or -1, got \[1, 1\]"),
        ({"rows": torch.tensor([0, 2], dtype=torch.int32)}, r"rows must be different .* 0 to 1, or -1, got \[0, 2\]"),
        ({"rows": torch.tensor([0, -2], dtype=torch.int32)}, r"rows must be different .* or -1, got \[0, -2\]"),
        ({"num_sink_tokens": 4, "local_window_size": 2}, "must not exceed keep_window_size, got 4 . 2 > 5"),
        ({"softcap": -1.0}, "softcap must be 0 .off. or positive"),
    ],
)
def test_arguments_that_do_not_fit(changes, message):
    with pytest.raises(ValueError, match=message):
        decode_step(**arguments(**changes))


def test_a_backend_that_cannot_serve_says_why():
    slots = make_slots(2, 2, 5, 8, torch.float64, "cpu")
    token = {name: states.double() for name, states in arguments().items() if name != "slots"}
    with pytest.raises(RuntimeError, match="backend 'triton' cannot serve this call: "):
        decode_step(**token, slots=slots, backend="triton")
    with pytest.raises(RuntimeError, match="backend 'cuda' cannot serve this call: it does no decoding"):
        decode_step(**token, slots=slots, backend="cuda")


def test_victims_after_a_change_by_hand():
    """The least important key that competes, whatever the slots held before."""
    slots = make_slots(1, 1, 3, 8, torch.float32, "cpu")
    slots.positions.copy_(torch.tensor([[[0, 4, 2]]]))
    slots.importance.copy_(torch.tensor([[[0.0, 1.0, 2.0]]]))
    slots.lengths.fill_(5)
    refresh_victims(slots, num_sink_tokens=1)
    assert slots.victims.item() == 1
    refresh_victims(slots, num_sink_tokens=1, local_window_size=2)
    assert slots.victims.item() == 2


def test_the_operator_is_what_the_compiler_expects():
    """Its schema names what it changes, and its fake has the shapes of the real one."""
    case = replace(CASES["sinks-local"], is_padded=False)
    query, key, value, importance, _ = draw(case, torch.float32)
    query, key, value = (states[:, :1] for states in (query, key, value))
    slots = make_slots(2, 2, case.w, case.head_dim, torch.float32, DEVICE)
    options = (case.s, case.r, None, 0.3, 0.0, True, "reference")
    call = (query, key, value, importance[:, :, :1], None, None, *slots, *options)
    torch.library.opcheck(decode_step_op, call, test_utils=("test_schema", "test_faketensor"))


def test_the_operator_is_left_out_where_nobody_would_see_it(monkeypatch):
    """Its machinery takes longer than launching a kernel. With it or without, the step is the same."""
    calls, operator = [], slots_module.decode_step_op
    monkeypatch.setattr(slots_module, "decode_step_op", lambda *inputs: calls.append(inputs) or operator(*inputs))
    case = CASES["sinks-local"]
    inputs = draw(case, torch.float32)

    def run():
        slots = make_slots(2, 2, case.w, case.head_dim, torch.float32, DEVICE)
        return torch.cat(list(steps(case, slots, *inputs, "reference")), dim=1), slots

    with torch.no_grad():
        out, slots = run()
        assert not calls
        with FlopCounterMode(display=False):
            assert torch.equal(run()[0], out)
        assert len(calls) == case.length
    again, others = run()
    assert len(calls) == 2 * case.length and torch.equal(again, out)
    assert all(map(torch.equal, slots, others))
