"""Keys and values in 8 bits: the rounding and its bounds, and steps that attend to exactly what was rounded."""

import pytest
import torch

from flash_dmattn.float8 import NUMBERS, as_bits, check_slot_dtype, from_float8, round_to_float8
from flash_dmattn.slots import decode_step, make_slots

from .test_slots import (
    BACKENDS_AND_DTYPES,
    CASES,
    DEVICE,
    NO_TRITON,
    arguments,
    draw,
    expected_output,
    small_programs,  # noqa: F401, a fixture
    steps,
)

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
NAMES = ["sinks-local", "one", "window", "query-heads", "special", "values-longer"]


def rows_of_all_sizes(dtype):
    """Numbers that differ by up to 2^26 within a row, rows that differ by more, and two rows of edges."""
    rows = torch.randn(16, 24, dtype=torch.float64) * torch.randint(-14, 13, (16, 24)).double().exp2()
    rows *= torch.randint(-8, 1, (16, 1)).double().exp2()
    rows[0], rows[1, 1:] = 0, 0
    # the largest number, just above it, ties between two numbers, subnormal ones, the smallest and less than half of it
    edges = [448, 1, 17, 19, 2**-7, 3 * 2**-9, 1.5 * 2**-9, 2**-9, 2**-10, 2**-11, -17, -0.0]
    rows[2], rows[3] = (torch.tensor([*edges, first, *[0] * 11], dtype=torch.float64) for first in (448, 450))
    return rows.to(dtype).to(DEVICE)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_numbers_times_scale_are_nearest(dtype):
    rows = rows_of_all_sizes(dtype)
    numbers, scales = round_to_float8(rows)
    codes = torch.arange(256, dtype=torch.uint8, device=DEVICE)
    every = codes[codes & 127 != 127].view(NUMBERS).double()
    exact, scales = rows.double(), scales.double().unsqueeze(-1)
    error = (exact - numbers.double() * scales).abs()
    smallest = (exact.unsqueeze(-1) - every * scales.unsqueeze(-1)).abs().amin(-1)
    assert torch.equal(error, smallest)
    largest = exact.abs().amax(-1, keepdim=True)
    assert (error <= torch.maximum(exact.abs() * 2**-4, largest * 2**-17)).all()
    assert ((scales * 224 < largest) & (largest <= scales * 448) | (largest == 0)).all()
    assert (scales.frexp().mantissa == 0.5).all()  # a power of 2; log2 of one is no integer on every GPU


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_was_rounded_rounds_to_itself(dtype):
    numbers, scales = round_to_float8(rows_of_all_sizes(dtype))
    once = from_float8(numbers, scales, dtype)
    assert torch.equal(once.double(), numbers.double() * scales.double().unsqueeze(-1))
    assert torch.equal(from_float8(*round_to_float8(once), dtype), once)


def test_the_largest_number_stays_finite():
    row = torch.full((1, 8), torch.finfo(torch.float16).max, dtype=torch.float16)
    assert torch.equal(from_float8(*round_to_float8(row), torch.float16), row)


@pytest.mark.parametrize("number", [torch.inf, -torch.inf, torch.nan, 1e300], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_that_is_not_finite_stays_no_number(dtype, number):
    """It would become a large finite number otherwise, which nobody notices."""
    rows = torch.tensor([[1, number, 2], [1, 3, 2]], dtype=torch.float64).to(dtype)
    numbers, scales = round_to_float8(rows)
    found = from_float8(numbers, scales, dtype)
    assert found[0].isnan().all() and numbers[0].isnan().all() and scales[0].isnan()
    assert torch.equal(found[1], rows[1])


def rounded(states):
    return from_float8(*round_to_float8(states), states.dtype)


def make_rounded(case, num_heads, dtype, batch=2):
    return make_slots(batch, num_heads, case.w, case.head_dim, dtype, DEVICE, case.value_dim, NUMBERS)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("backend", "dtype"), BACKENDS_AND_DTYPES)
def test_token_by_token_equals_one_pass_over_rounded_keys(name, backend, dtype, small_programs):  # noqa: F811
    """And the kept keys are those of slots that are not rounded, in the same slots."""
    case = CASES[name]
    query, key, value, importance, mask = inputs = draw(case, dtype)
    expected = expected_output(case, query, rounded(key), rounded(value), importance, mask)
    slots = make_rounded(case, importance.shape[1], dtype)
    others = make_slots(2, importance.shape[1], case.w, case.head_dim, dtype, DEVICE, case.value_dim)
    found = []
    for out, _ in zip(steps(case, slots, *inputs, backend), steps(case, others, *inputs, backend), strict=True):
        found.append(out)
        assert all(map(torch.equal, slots[2:7], others[2:7]))
    tolerance = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 1e-2}[dtype]
    torch.testing.assert_close(torch.cat(found, dim=1).to(expected.dtype), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.skipif(NO_TRITON, reason="Triton is not installed, or neither a GPU nor its interpreter is used")
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_backends_store_the_same(dtype, small_programs):  # noqa: F811
    """Of rows over all sizes, with ties, subnormal numbers and -0. Attention agrees as far as `dtype` does."""
    rows = rows_of_all_sizes(dtype).view(8, 1, 2, 24)  # a token of 8 batch rows with 2 heads
    token = {"query": torch.randn(8, 1, 4, 24, device=DEVICE).to(dtype) / 24, "key": rows, "value": rows.flip(0)}
    token["importance"] = torch.randn(8, 2, 1, device=DEVICE)
    ours, theirs = (make_slots(8, 2, 2, 24, dtype, DEVICE, slot_dtype=NUMBERS) for _ in range(2))
    for _ in range(2):
        out = decode_step(**token, slots=ours, backend="triton")
        expected = decode_step(**token, slots=theirs, backend="reference")
        torch.testing.assert_close(out, expected, atol=2e-2, rtol=2e-2)
    assert all(torch.equal(as_bits(one), as_bits(other)) for one, other in zip(ours, theirs, strict=True))


@pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning")  # of Triton's interpreter
@pytest.mark.parametrize("number", [torch.inf, -torch.inf, torch.nan], ids=str)
@pytest.mark.parametrize("name", ["key", "value"])
@pytest.mark.parametrize(("backend", "dtype"), BACKENDS_AND_DTYPES)
def test_a_token_that_is_not_finite_is_seen(backend, dtype, name, number):
    """By itself and by the next token: the head that holds it has no result, and the other one has."""
    slots = make_slots(1, 2, 4, 16, dtype, DEVICE, slot_dtype=NUMBERS)
    token = {state: torch.ones(1, 1, 2, 16, dtype=dtype, device=DEVICE) for state in ("query", "key", "value")}
    token["importance"] = torch.zeros(1, 2, 1, dtype=torch.float64 if dtype == torch.float64 else None, device=DEVICE)
    token[name] = token[name].clone()
    token[name][0, 0, 0, 3] = number
    for _ in range(2):
        out = decode_step(**token, slots=slots, backend=backend)
        assert out[0, 0, 0].isnan().all() and torch.equal(out[0, 0, 1], torch.ones_like(out[0, 0, 1]))
        token[name] = torch.ones_like(token[name])


@pytest.mark.skipif(NO_TRITON, reason="Triton is not installed, or neither a GPU nor its interpreter is used")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("sliding_window", [None, 4], ids=["seen", "hidden"])
def test_a_value_without_weight_takes_no_digits_of_others(dtype, sliding_window):
    """It is 2^22 times as large as the other 7."""
    slots = [make_slots(1, 1, 8, 16, dtype, DEVICE, slot_dtype=NUMBERS) for _ in range(2)]
    large, size = (2.0**22, 1) if dtype == torch.bfloat16 else (2.0**12, 2.0**-10)
    query, key = (torch.ones(1, 1, 1, 16, dtype=dtype, device=DEVICE) for _ in range(2))
    for number in range(8):
        value = torch.randn(1, 1, 1, 16, device=DEVICE).to(dtype) * (large if number == 0 else size)
        token = (query, key * (-20 if number == 0 else number / 7), value, torch.zeros(1, 1, 1, device=DEVICE))
        windows = {"sliding_window": sliding_window}
        out, expected = (
            decode_step(*token, one, **windows, backend=backend)
            for one, backend in zip(slots, ("triton", "reference"), strict=True)
        )
    torch.testing.assert_close(out / size, expected / size, atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize(("backend", "dtype"), BACKENDS_AND_DTYPES)
def test_rows_of_more_slots(backend, dtype, small_programs):  # noqa: F811
    case = CASES["sinks-local"]
    inputs = draw(case, dtype)
    own, pool = (make_rounded(case, 2, dtype, batch) for batch in (2, 5))
    untouched = [0, 2, 4]
    for state in pool:
        as_bits(state)[untouched] = 7
    rows = torch.tensor([3, 1], dtype=torch.int32, device=DEVICE)
    expected = list(steps(case, own, *inputs, backend))
    for out, found in zip(expected, steps(case, pool, *inputs, backend, rows=rows), strict=True):
        assert torch.equal(found, out)
    for state, other in zip(map(as_bits, own), map(as_bits, pool), strict=True):
        assert torch.equal(state, other[rows.long()])
        assert (other[untouched] == 7).all()


def test_bytes_of_a_slot():
    """Of bfloat16 and head dim 64: 2 * 64 + 2 * 2 bytes instead of 4 * 64, beside 8 of importance and position."""
    sizes = [make_slots(1, 1, 1024, 64, torch.bfloat16, "meta", slot_dtype=kind) for kind in (None, "float8_e4m3fn")]
    assert [sum(state.nbytes for state in slots) // 1024 for slots in sizes] == [264, 140]


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA GPU: the conversions of the hardware are to be seen")
@pytest.mark.parametrize(("batch", "head_dim"), [(1, 128), (1, 64), (16, 128), (64, 128), (64, 64)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@torch.no_grad()
def test_backends_agree_at_the_sizes_of_models(batch, head_dim, dtype):
    windows = {"num_sink_tokens": 4, "local_window_size": 1536}
    ours, theirs = (make_slots(batch, 8, 2048, head_dim, dtype, DEVICE, slot_dtype=NUMBERS) for _ in range(2))
    for states, scales in ((ours.keys, ours.key_scales), (ours.values, ours.value_scales)):
        for to, new in zip((states, scales), round_to_float8(torch.randn(states.shape, device=DEVICE)), strict=True):
            to.copy_(new)
    ours.positions.copy_(torch.rand(batch, 8, 10000, device=DEVICE).argsort(-1)[..., :2048])
    ours.importance.normal_()
    ours.lengths.fill_(10000)
    for state, other in zip(ours, theirs, strict=True):
        other.copy_(state)
    for _ in range(3):
        query = torch.randn(batch, 1, 32, head_dim, device=DEVICE, dtype=dtype)
        key, value = torch.randn(2, batch, 1, 8, head_dim, device=DEVICE, dtype=dtype)
        token = (query, key, value, torch.randn(batch, 8, 1, device=DEVICE))
        out = decode_step(*token, ours, **windows, backend="triton")
        expected = decode_step(*token, theirs, **windows, backend="reference")
        torch.testing.assert_close(out, expected, atol=2e-2, rtol=2e-2)
        assert all(torch.equal(as_bits(one), as_bits(other)) for one, other in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("kind", [torch.float8_e5m2, torch.int8, torch.bfloat16, "float8", "fp4"], ids=str)
def test_other_dtypes_are_refused(kind):
    with pytest.raises(ValueError, match=r"slot_dtype must be None or torch.float8_e4m3fn, got .*\w"):
        check_slot_dtype(kind)


def test_slots_that_do_not_fit():
    slots = make_slots(2, 2, 5, 8, torch.float32, "cpu", slot_dtype=NUMBERS)
    plain = make_slots(2, 2, 5, 8, torch.float32, "cpu")
    with pytest.raises(ValueError, match=r"slots.values must be torch.float8_e4m3fn .* got torch.float32"):
        decode_step(**arguments(slots=slots._replace(values=plain.values)))
    with pytest.raises(ValueError, match=r"slots.key_scales must be torch.bfloat16 .*\(2, 2, 5\), got .*\(2, 2, 0\)"):
        decode_step(**arguments(slots=slots._replace(key_scales=plain.key_scales)))
    with pytest.raises(ValueError, match=r"slots.value_scales must be .*\(2, 2, 0\), got .*\(2, 2, 5\)"):
        decode_step(**arguments(slots=plain._replace(value_scales=slots.value_scales)))


def test_a_gpu_that_converts_no_float8_says_so(monkeypatch):
    from flash_dmattn.backends import triton as backend

    monkeypatch.setattr(backend, "is_interpreted", lambda: False)
    for capability, expected in {
        (8, 0): "need compute capability 8.9 or newer, this GPU has 8.0",
        (9, 0): None,
    }.items():
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        reason = backend._reject_float8.__wrapped__(torch.device("cuda"))
        assert reason == (expected and f"slots in float8_e4m3fn {expected}")
