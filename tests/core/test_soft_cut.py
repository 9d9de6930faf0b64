"""The soft cut in torch and in Triton: thresholds, the keys that set them, scores and gradients."""

import importlib.util
import math
import random
import re

import pytest
import torch
from conftest import SEED

from flash_dmattn import dynamic_mask_attention, select_visible
from flash_dmattn.backends import triton
from flash_dmattn.calls import CutCall
from flash_dmattn.soft_selection import cut_softly, soft_cut_op
from tests.core import soft_definition
from tests.core.attention_cases import as_strided_view
from tests.core.definition import sequences_of_row
from tests.core.test_ops import RecordCalls, check_ops, registered_ops

HAS_GPU = torch.cuda.is_available()
DEVICE = "cuda" if HAS_GPU else "cpu"
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or not (HAS_GPU or triton.is_interpreted()),
    reason="Triton is not installed, or neither a GPU nor its interpreter is used",
)
# The scores of keys far from the rest can be infinite in float32, which numpy, under Triton's interpreter, says.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in cast:RuntimeWarning")
BACKENDS = ["reference", pytest.param("triton", marks=needs_triton)]


@pytest.fixture
def small_blocks(monkeypatch):
    """Programs that need several blocks for a short sequence."""
    monkeypatch.setattr("flash_dmattn.backends.triton.soft_cut._BLOCK", 16)


def random_problem(number, lengths, dtype):
    """Returns importance, a temperature, the number of queries, and the windows and sequences of a random selection."""
    rng = random.Random(SEED + number)
    generator = torch.Generator().manual_seed(SEED + number)
    kind = rng.choice(["plain", "padded", "packed", "packed and padded"])
    length = rng.choice(lengths)
    batch = 1 if "packed" in kind else rng.choice([1, 3])
    sinks, local = rng.choice([0, 2]), rng.choice([0, 1, 5])
    selection = {
        "keep_window_size": max(1, sinks + local + rng.choice([0, 1, 3, 8])),
        "num_sink_tokens": sinks,
        "local_window_size": local,
        "padding_mask": torch.rand(batch, length, generator=generator) > 0.3 if "padded" in kind else None,
        "cu_seqlens": None,
    }
    if "packed" in kind:
        cuts = sorted(rng.randrange(length + 1) for _ in range(3))
        selection["cu_seqlens"] = torch.tensor([0, *cuts, length], dtype=torch.int32)
    importance = torch.randn(batch, 2, length, generator=generator, dtype=torch.float64)
    if rng.random() < 0.3:  # ties
        importance = (2 * importance).round() / 2
    for special in (-math.inf, math.nan, math.inf, -0.0):
        if rng.random() < 0.2:
            importance[torch.rand(importance.shape, generator=generator) < rng.choice([0.1, 0.7])] = special
    importance = importance.to(dtype)
    if rng.random() < 0.3:
        importance = as_strided_view(importance[..., None])[..., 0]
    temperature = rng.choice([0.25, torch.tensor(0.5), torch.tensor(2.0, dtype=torch.float64)])
    return importance, temperature, rng.choice([length, max(1, length // 2)]), selection


def total(score, threshold, padding_mask):
    """A random sum of what is finite and no padding, to differentiate."""
    generator = torch.Generator().manual_seed(SEED)
    result = 0
    for number in (score, threshold):
        factors = torch.randn(number.shape, generator=generator, dtype=torch.float64).to(number.device)
        counts = number.isfinite()
        if padding_mask is not None:
            counts = counts & padding_mask[:, None, padding_mask.shape[-1] - number.shape[-1] :].to(number.device)
        result = result + (torch.where(counts, number, 0) * factors).sum()
    return result


def soft_cut_call(importance, temperature, seqlen_q, selection, backend):
    """Returns the arguments with which `cut_softly` calls its operator."""
    death = select_visible(importance, **selection).death
    with RecordCalls() as recorder:
        cut_softly(importance, death, temperature, seqlen_q, **selection, backend=backend)
    function, arguments, _ = recorder.calls[-1]
    assert function is soft_cut_op
    return arguments


def run(importance, temperature, seqlen_q, selection, backend):
    """Returns what the operator returns, and the gradient of its `total`, on the CPU."""
    device = DEVICE if backend == "triton" else "cpu"
    importance, temperature, *tensors = (
        x.to(device) if isinstance(x, torch.Tensor) else x for x in (importance, temperature, *selection.values())
    )
    arguments = soft_cut_call(importance, temperature, seqlen_q, dict(zip(selection, tensors, strict=True)), backend)
    importance = importance.detach().requires_grad_()
    names = ("score", "threshold", "contested_from", "keys", "scale")
    results = dict(zip(names, soft_cut_op(importance, *arguments[1:]), strict=True))
    whole = total(results["score"], results["threshold"], selection["padding_mask"])
    results["dimportance"] = torch.autograd.grad(whole, importance)[0]
    return {name: x.detach().cpu() for name, x in results.items()}


def by_definition(importance, temperature, seqlen_q, selection):
    """Returns score, threshold, keys and dimportance; the score of padding is NaN."""
    importance = importance.double().detach().requires_grad_()
    values, temperature = soft_definition.comparable(importance), float(temperature)
    batch, num_heads, length = values.shape
    score, threshold = torch.full_like(values, math.nan), torch.full_like(values, -math.inf)
    keys = torch.full((2, *values.shape), -1, dtype=torch.int32)
    for b in range(batch):
        real = [True] * length if selection["padding_mask"] is None else selection["padding_mask"][b].tolist()
        for document in sequences_of_row(length, real, selection["cu_seqlens"]):
            for h in range(num_heads):
                mean, scale = soft_definition.mean_and_scale(values[b, h].detach(), document, temperature)
                score[b, h, document] = (values[b, h, document] - mean) * scale
    for b, h, document, row, _, best_evicted, worst_kept in soft_definition.cuts(importance, **selection):
        theta = soft_definition.threshold(values[b, h], best_evicted, worst_kept)
        if theta > -math.inf:
            mean, scale = soft_definition.mean_and_scale(values[b, h].detach(), document, temperature)
            threshold[b, h, row] = (theta - mean) * scale
            keys[:, b, h, row] = torch.tensor([best_evicted, -1 if worst_kept is None else worst_kept])
    threshold, keys = (x[..., length - seqlen_q :] for x in (threshold, keys))
    whole = total(score, threshold, selection["padding_mask"])
    dimportance = torch.autograd.grad(whole, importance)[0]
    results = {"score": score, "threshold": threshold, "keys": keys, "dimportance": dimportance}
    return {name: x.detach() for name, x in results.items()}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("number", range(40))
def test_scores_thresholds_keys_and_gradients_are_those_of_the_definition(number, backend, small_blocks):
    dtype = torch.float64 if backend == "reference" else random.Random(number).choice([torch.float32, torch.bfloat16])
    problem = importance, _, seqlen_q, selection = random_problem(number, [1, 2, 5, 17, 40], dtype)
    got, expected = run(*problem, backend), by_definition(*problem)
    is_real = torch.ones(importance.shape, dtype=torch.bool)
    if selection["padding_mask"] is not None:
        is_real &= selection["padding_mask"][:, None]
    is_query = is_real[..., importance.shape[-1] - seqlen_q :]
    assert torch.equal(got["keys"][:, is_query], expected["keys"][:, is_query])
    tolerance = {torch.float64: 1e-9, torch.float32: 1e-5, torch.bfloat16: 1e-5}[dtype]
    for name, counts in (("score", is_real), ("threshold", is_query), ("dimportance", is_real)):
        if name == "dimportance" and dtype == torch.bfloat16:
            tolerance = 1e-2
        torch.testing.assert_close(
            got[name][counts].double(), expected[name][counts], rtol=tolerance, atol=tolerance, msg=name
        )


@needs_triton
@pytest.mark.parametrize("number", range(40))
def test_triton_equals_the_reference(number, small_blocks):
    problem = random_problem(1000 + number, [16, 33, 150], torch.float32)
    torch.testing.assert_close(run(*problem, "triton"), run(*problem, "reference"), rtol=1e-5, atol=1e-5)


SELECTION = {"keep_window_size": 9, "num_sink_tokens": 1, "local_window_size": 3}


@needs_triton
@pytest.mark.parametrize("mean", [0.0, 1e4, -3e30])
def test_the_moments_lose_nothing_beside_a_large_mean(mean, small_blocks):
    importance = mean + torch.randn(1, 1, 500) * max(1e-2, abs(mean) * 1e-5)
    selection = {**SELECTION, "padding_mask": None, "cu_seqlens": None}
    got, expected = (run(importance, 1.0, 500, selection, backend) for backend in ("triton", "reference"))
    torch.testing.assert_close(got["scale"], expected["scale"], rtol=1e-6, atol=0)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)  # sums of hundreds in float32


@needs_triton
def test_equal_inputs_give_equal_gradients(small_blocks):
    problem = random_problem(0, [150], torch.float32)
    first, again = (run(*problem, "triton") for _ in range(2))
    assert all(torch.equal(first[name], again[name]) for name in ("score", "threshold", "dimportance"))


class RecordNames(RecordCalls):
    """Remembers the names of all operators."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.calls.append(function.name().split(".")[0])
        return function(*args, **(kwargs or {}))


@needs_triton
@pytest.mark.parametrize("temperature", [0.5, torch.tensor(0.5)])
def test_triton_launches_nothing_but_its_kernels(monkeypatch, temperature):
    from flash_dmattn.backends.triton import soft_cut

    launches = []

    class Kernel:
        def __getitem__(self, grid):
            return lambda *arguments, **constants: launches.append(grid)

    monkeypatch.setattr(soft_cut, "_cut", Kernel())
    monkeypatch.setattr(soft_cut, "_cut_backward", Kernel())
    importance = torch.randn(2, 3, 40).transpose(0, 1)
    call = CutCall.unflatten(soft_cut_call(importance, temperature, 20, SELECTION, "triton"))
    launches.clear()
    with RecordNames() as recorder:
        score, threshold, _, keys, scale = triton.cut(call)
        triton.cut_backward(call, keys, scale, score, threshold)
    assert launches == [(1, 6), (1, 6)]
    assert set(recorder.calls) <= {"aten::empty", "aten::empty_like", "aten::select", "aten::detach"}


def test_no_operator_but_those_of_the_cut_is_called():
    importance = torch.randn(2, 3, 40, requires_grad=True)
    death = select_visible(importance, **SELECTION).death
    gradients = torch.randn(2, 2, 3, 40).unbind()
    with RecordNames() as recorder:
        cut = cut_softly(importance, death, 0.5, 40, **SELECTION)
        torch.autograd.grad(cut[:2], importance, gradients)
    operators = [name for name in recorder.calls if name != "aten::detach"]
    assert operators == ["flash_dmattn::soft_cut", "flash_dmattn::soft_cut_backward"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_operators_are_what_the_compiler_expects(backend):
    importance = torch.randn(2, 2, 23, device=DEVICE, requires_grad=True)
    padding_mask = torch.rand(2, 23, device=DEVICE) > 0.3
    for options, temperature in (({}, 0.5), ({"padding_mask": padding_mask}, torch.tensor(0.5, device=DEVICE))):
        death = select_visible(importance, **SELECTION, **options).death
        with RecordCalls() as recorder:
            cut = cut_softly(importance, death, temperature, 20, **SELECTION, **options, backend=backend)
            torch.autograd.grad(cut.score.sum() + cut.threshold[..., -1].sum(), importance)
        calls = [call for call in recorder.calls if "soft_cut" in call[0].name()]
        check_ops(calls, registered_ops("soft_cut"))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("temperature", [0.5, torch.tensor(0.5)])
def test_compiled_without_a_graph_break_it_gives_the_same(temperature, backend):
    inputs = [torch.randn(1, 40, heads, 16, requires_grad=True) for heads in (4, 2, 2)]
    inputs.append(torch.randn(1, 2, 40, requires_grad=True))

    def attend(*inputs):
        options = {"selection_temperature": temperature, "selection_band": 1.5, "backend": backend}
        return dynamic_mask_attention(*inputs, **SELECTION, **options)

    torch._dynamo.reset()
    results = []
    for function in (attend, torch.compile(attend, fullgraph=True, backend="aot_eager")):
        out = function(*inputs)
        results.append((out, *torch.autograd.grad(out.square().sum(), inputs)))
    torch.testing.assert_close(*results)


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
def test_it_maps_over_a_batch_with_gradients():
    importance = torch.randn(3, 1, 2, 20)

    def loss(importance):
        death = select_visible(importance, **SELECTION).death
        score, threshold, _ = cut_softly(importance, death, 0.5, 20, **SELECTION)
        return score.square().sum() + torch.where(threshold > -torch.inf, threshold, 0).sum()

    mapped = torch.vmap(torch.func.grad(loss))(importance)
    for number in range(3):
        one = importance[number].requires_grad_()
        torch.testing.assert_close(mapped[number], torch.autograd.grad(loss(one), one)[0])


@pytest.mark.skipif(not HAS_GPU, reason="needs a CUDA GPU")
def test_a_captured_graph_cuts_what_stands_in_its_inputs():
    importance = torch.randn(2, 3, 5000, device="cuda", requires_grad=True)
    death = select_visible(importance, **SELECTION).death.clone()
    temperature = torch.tensor(0.5, device="cuda")
    gradients = torch.randn(2, *importance.shape, device="cuda").unbind()

    def step():
        cut = cut_softly(importance, death, temperature, 5000, **SELECTION)
        return *cut, *torch.autograd.grad(cut[:2], importance, gradients)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        importance.normal_()
        temperature.fill_(0.25)
        death.copy_(select_visible(importance, **SELECTION).death)
    graph.replay()
    assert all(map(torch.equal, captured, step()))


@needs_triton
@pytest.mark.parametrize(
    ("importance", "reason"),
    [
        (torch.zeros(1, 1, 4, dtype=torch.float64, device=DEVICE), "dtype torch.float64 is not supported"),
        (torch.zeros(1, 1, 1, device=DEVICE).expand(70000, 1, 4), "70000 \\(batch, head\\) pairs are above"),
        (torch.zeros(1, 1, 4, device=DEVICE), None),
    ],
)
def test_triton_says_what_it_refuses(importance, reason):
    call = CutCall.unflatten([importance, *[None] * (len(CutCall.parameters()) - 1)])
    refusal = triton.reject_cut(call)
    assert refusal is None if reason is None else re.match(reason, refusal)
