"""Attention sinks as a factor of `out`: the one pass of Triton equals the operations of torch, forward and backward."""

import importlib.util
from contextlib import nullcontext

import pytest
import torch
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from flash_dmattn import dispatch, interval_attention, sink_logits
from flash_dmattn.backends import triton
from flash_dmattn.sink_logits import with_sinks

HAS_GPU = torch.cuda.is_available()
DEVICE = "cuda" if HAS_GPU else "cpu"
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or not (HAS_GPU or triton.is_interpreted()),
    reason="Triton is not installed, or neither a GPU nor its interpreter is used",
)
BACKENDS = ["reference", pytest.param("triton", marks=needs_triton)]
NOWHERE = -torch.inf
ROUNDING = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def problem(batch=2, seqlen=37, num_heads=3, head_dim=24, dtype=torch.float32, device=DEVICE):
    """Returns out, lse, sinks and dresult; some rows see no key, and some sinks take everything or nothing."""
    generator = torch.Generator().manual_seed(0)
    lse = 3 * torch.randn(batch, num_heads, seqlen, generator=generator)
    lse[torch.rand(lse.shape, generator=generator) < 0.2] = NOWHERE
    out, dresult = torch.randn(2, batch, seqlen, num_heads, head_dim, generator=generator)
    out[(lse == NOWHERE).transpose(1, 2)] = 0
    sinks = torch.randn(num_heads, generator=generator)
    sinks[0], sinks[-1] = NOWHERE, 1e4
    out, lse, sinks, dresult = (tensor.to(device) for tensor in (out, lse, sinks, dresult))
    return out.to(dtype), lse, sinks, dresult.to(dtype)


def results(out, lse, sinks, dresult, **options):
    """Returns the result and the gradients of out, lse and sinks."""
    inputs = [tensor.detach().requires_grad_() for tensor in (out, lse, sinks)]
    result = with_sinks(*inputs, **options)
    return result.detach(), *torch.autograd.grad(result, inputs, dresult)


def expected_results(out, lse, sinks, dresult):
    """The same in float64, by a softmax over the visible keys together and the sink."""
    inputs = [tensor.detach().double().requires_grad_() for tensor in (out, lse, sinks)]
    both = torch.stack([inputs[1], inputs[2][:, None].expand_as(inputs[1])])
    sees_none = inputs[1] == NOWHERE
    share = torch.where(sees_none, 0, both.where(~sees_none, 0.0).softmax(0)[0])
    result = inputs[0] * share.transpose(1, 2)[..., None]
    return result.detach(), *torch.autograd.grad(result, inputs, dresult.double())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["float32", "float16", "bfloat16"]
)
@pytest.mark.parametrize("shape", [(2, 37, 3, 24), (1, 300, 2, 128), (3, 1, 5, 80), (1, 9, 4, 256)], ids=str)
def test_result_and_gradients_equal_float64(shape, dtype, backend):
    call = problem(*shape, dtype=dtype)
    for found, expected in zip(results(*call, backend=backend), expected_results(*call), strict=True):
        assert found.isfinite().all()
        scale = expected.abs().max().item() + 1e-9
        torch.testing.assert_close(found.double(), expected, atol=ROUNDING[dtype] * scale, rtol=ROUNDING[dtype])


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU, reason="needs a CUDA GPU: sizes that its memory is busy with")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
@pytest.mark.parametrize("head_dim", [64, 80, 128, 256])
def test_long_rows_on_a_gpu_equal_float64_and_themselves(head_dim, dtype):
    call = problem(1, 8192, 16, head_dim, dtype)
    found, again = results(*call), results(*call)
    assert all(map(torch.equal, found, again))
    for one, expected in zip(found, expected_results(*call), strict=True):
        scale = expected.abs().max().item()
        torch.testing.assert_close(one.double(), expected, atol=ROUNDING[dtype] * scale, rtol=ROUNDING[dtype])


@needs_triton
def test_layouts_do_not_matter():
    call = problem()
    expected = results(*call, backend="triton")
    out, lse, sinks, dresult = call
    out = torch.cat([out, out], -1)[..., : out.shape[-1]].transpose(0, 1).contiguous().transpose(0, 1)
    lse, sinks = lse.mT.contiguous().mT, torch.stack([sinks, sinks], -1)[:, 0]
    dresult = dresult.permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0)
    assert not any(tensor.is_contiguous() for tensor in (out, lse, sinks, dresult))
    assert all(map(torch.equal, results(out, lse, sinks, dresult, backend="triton"), expected))
    ones = results(*call[:3], torch.ones((), device=DEVICE).expand_as(dresult), backend="triton")
    assert all(map(torch.equal, ones, results(*call[:3], torch.ones_like(dresult).contiguous(), backend="triton")))


@pytest.mark.parametrize("backend", BACKENDS)
def test_sinks_of_minus_infinity_and_rows_that_see_no_key_meet(backend):
    out, lse = torch.zeros(1, 2, 1, 4, device=DEVICE), torch.tensor([[[NOWHERE, 1.0]]], device=DEVICE)
    out[:, 1] = 1
    sinks = torch.tensor([NOWHERE], device=DEVICE)
    result, *gradients = results(out, lse, sinks, torch.ones_like(out), backend=backend)
    assert torch.equal(result, out)
    dout, dlse, dsinks = gradients
    assert torch.equal(dout, out) and not dlse.any() and not dsinks.any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_gives_nothing(backend):
    for shape in ((0, 3, 2, 8), (1, 0, 2, 8), (1, 3, 2, 0)):
        result, *_, dsinks = results(*problem(*shape), backend=backend)
        assert result.shape == shape and not dsinks.any()


@needs_triton
def test_gradients_join_those_of_others_who_use_lse():
    """The gradients of attention's inputs too, through out and lse at once."""
    query, key, value = (torch.randn(1, 12, 2, 16, device=DEVICE, requires_grad=True) for _ in range(3))
    sinks = torch.randn(2, device=DEVICE, requires_grad=True)
    found = []
    for backend in ("reference", "triton"):
        out, lse = interval_attention(query, key, value, None, None, return_lse=True, backend="reference")
        loss = with_sinks(out, lse, sinks, backend=backend).square().sum() + lse.square().sum()
        found.append(torch.autograd.grad(loss, (query, key, value, sinks)))
    for ours, expected in zip(*reversed(found), strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-4)


class GiveNothing(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor):
        return tensor.clone()

    @staticmethod
    def backward(ctx, _):
        return None


@needs_triton
def test_no_gradient_is_passed_on_as_none_and_only_wanted_ones_are_returned():
    out, lse, sinks, dresult = problem()
    leaf = sinks.requires_grad_()
    GiveNothing.apply(with_sinks(out, lse, sinks, backend="triton")).sum().backward()
    assert leaf.grad is None
    with_sinks(out, lse, sinks, backend="triton").backward(dresult)
    torch.testing.assert_close(leaf.grad, results(out, lse, sinks, dresult, backend="triton")[3], rtol=0, atol=0)
    assert out.grad is None and lse.grad is None


@needs_triton
def test_there_is_no_second_derivative():
    out, lse, sinks, dresult = problem()
    out.requires_grad_()
    (dout,) = torch.autograd.grad(with_sinks(out, lse, sinks, backend="triton"), out, dresult, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        dout.sum().backward()


@needs_triton
def test_memory_is_reused_only_where_that_is_allowed_and_no_gradient_is_wanted():
    out, lse, sinks, _ = problem()
    before, expected = out.clone(), with_sinks(out, lse, sinks, backend="reference")
    with_sinks(out, lse, sinks, backend="triton")
    with_sinks(out, lse, sinks.clone().requires_grad_(), may_overwrite=True, backend="triton")
    assert torch.equal(out, before)
    result = with_sinks(out, lse, sinks, may_overwrite=True, backend="triton")
    assert result.data_ptr() == out.data_ptr()
    torch.testing.assert_close(result, expected)


class Watch(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.append(function.name())
        return function(*args, **(kwargs or {}))


@needs_triton
@pytest.mark.parametrize("may_overwrite", [False, True])
def test_who_intercepts_operations_sees_one_each_way(may_overwrite):
    call = problem()
    before, expected = call[0].clone(), results(*call, backend="triton")
    with Watch() as watch:
        found = results(*call, may_overwrite=may_overwrite, backend="triton")
        without = with_sinks(*call[:3], may_overwrite=may_overwrite, backend="triton")
    assert all(map(torch.equal, (*found, without), (*expected, expected[0]))) and torch.equal(call[0], before)
    ours = [name for name in watch.seen if name.startswith("flash_dmattn::")]
    assert ours == [f"flash_dmattn::with_sinks{end}" for end in ("", "_backward", "")]


@needs_triton
@pytest.mark.parametrize("is_watched_again", [False, True])
def test_a_checkpoint_may_be_watched_in_its_forward(is_watched_again):
    out, lse, sinks, dresult = problem()
    expected = results(out, lse, sinks, dresult, backend="triton")
    inputs = [tensor.detach().requires_grad_() for tensor in (out, lse, sinks)]
    with FlopCounterMode(display=False):
        result = checkpoint(with_sinks, *inputs, backend="triton", use_reentrant=False)
    with FlopCounterMode(display=False) if is_watched_again else nullcontext():
        gradients = torch.autograd.grad(result, inputs, dresult)
    assert all(map(torch.equal, (result, *gradients), expected))


@needs_triton
def test_the_operators_follow_the_rules_of_torch():
    out, lse, sinks, dresult = problem(1, 5, 3, 4)
    torch.library.opcheck(torch.ops.flash_dmattn.with_sinks_backward, (dresult, out, lse, sinks, "triton"))
    inputs = [tensor.requires_grad_() for tensor in (out, lse.clamp(min=-5), sinks.clamp(-1, 1))]
    torch.library.opcheck(torch.ops.flash_dmattn.with_sinks, (*inputs, "triton"))


@needs_triton
def test_who_transforms_operations_gets_operations_of_torch(monkeypatch):
    out, lse, sinks, _ = problem()
    expected = with_sinks(out, lse, sinks, backend="reference")
    monkeypatch.setattr(triton, "with_sinks", None)
    many = torch.vmap(lambda rows: with_sinks(rows, lse, sinks, backend="triton"))(out.expand(2, *out.shape))
    assert torch.equal(many, expected.expand(2, *out.shape))
    compiled = torch.compile(with_sinks, backend="eager", fullgraph=True)
    assert torch.equal(compiled(out, lse, sinks, backend="triton"), expected)


@needs_triton
@pytest.mark.parametrize("needs_gradients", [False, True])
def test_tangents_of_forward_mode_go_through(needs_gradients):
    out, lse, sinks, _ = problem(1, 5, 3, 4)
    sinks = torch.linspace(-1, 1, 3, device=DEVICE, requires_grad=needs_gradients)
    expected = (with_sinks(out, lse, sinks + 1e-2) - with_sinks(out, lse, sinks - 1e-2)) / 2e-2
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(sinks, torch.ones_like(sinks))
        result = with_sinks(out, lse, dual, may_overwrite=True, backend="triton")
        tangent = forward_ad.unpack_dual(result).tangent
    torch.testing.assert_close(tangent, expected, atol=1e-3, rtol=1e-2)


@needs_triton
def test_a_profiler_sees_what_runs_without_it(monkeypatch):
    ran = []
    monkeypatch.setattr(triton, "with_sinks", lambda *_: ran.append("triton"))
    with torch.profiler.profile():
        with_sinks(*problem()[:3], backend="triton")
    assert ran == ["triton"]


def test_float64_is_served_by_torch():
    out, lse, sinks = (tensor.double().requires_grad_() for tensor in problem(1, 3, 2, 4, device="cpu")[:3])
    assert dispatch.SINK_LOGITS.why_not("triton", out, lse, sinks) is not None
    finite = sinks.detach().clamp(min=-1, max=1).requires_grad_()
    seen = lse.detach().clamp(min=-5).requires_grad_()
    assert torch.autograd.gradcheck(sink_logits.with_sinks, (out, seen, finite))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lse": torch.zeros(2, 37, 3)}, r"lse must have shape \(2, 3, 37\), got \(2, 37, 3\)"),
        ({"sinks": torch.zeros(1, 3)}, r"sinks must have shape \(3,\), got \(1, 3\)"),
    ],
)
def test_other_shapes_are_refused(change, message):
    out, lse, sinks, _ = problem(device="cpu")
    with pytest.raises(ValueError, match=message):
        with_sinks(**{"out": out, "lse": lse, "sinks": sinks, **change})
