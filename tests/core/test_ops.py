"""The custom ops are well-formed, and torch.compile traces the public functions without a break."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from flash_dmattn import dynamic_mask_attention, interval_attention, select_visible
from flash_dmattn.calls import AttentionCall
from flash_dmattn.dense.attention import dense_attention
from flash_dmattn.dispatch import can_call_directly
from flash_dmattn.ops import interval_attention_op, run_attention

from .attention_cases import AttentionCase, documents, padding, window

NAMESPACE = "flash_dmattn"
CASES = [
    AttentionCase("causal", options=window(7, 1, 2)),
    AttentionCase("group-of-4", num_heads=8, num_kv_heads=2, options=window(7, softcap=3.0)),
    AttentionCase("per-query-head", num_heads=4, num_kv_heads=2, num_importance_heads=4),
    AttentionCase("no-bias", options=window(7, add_importance_bias=False)),
    AttentionCase("strided", strided=True, options=window(7, softcap=2.0)),
    AttentionCase("last-queries", seqlen_q=3, seqlen_k=20),
    AttentionCase("padding", options=window(7, padding_mask=padding("0" * 9 + "1" * 14, "1" * 23))),
    AttentionCase("packed", batch=1, options=window(5, 1, cu_seqlens=documents(10, 13), max_seqlen=13)),
    AttentionCase("not-causal", options=window(7, is_causal=False)),
    AttentionCase("bfloat16", dtype=torch.bfloat16),
    AttentionCase("float64", dtype=torch.float64, importance_dtype=torch.float64),
]


class RecordCalls(TorchDispatchMode):
    """Remembers the calls of this package's ops, so that they can be checked with the arguments they really get."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == NAMESPACE:
            self.calls.append((function, args, kwargs or {}))
        return function(*args, **(kwargs or {}))


def registered_ops(name=""):
    prefix = f"{NAMESPACE}::{name}"
    return {name.partition(".")[0] for name in torch._C._dispatch_get_all_op_names() if name.startswith(prefix)}


def recorded_calls(case):
    inputs = [x.requires_grad_() for x in case.inputs()]
    with RecordCalls() as recorder:
        out, lse = dynamic_mask_attention(*inputs, **case.options, return_lse=True)
        (out.sum() + lse.masked_fill(lse.isinf(), 0).sum()).backward()
    return recorder.calls


def as_leaf(x, function):
    """A tensor argument cut from its history; it asks for a gradient where it did, but not of a backward op."""
    if not isinstance(x, torch.Tensor):
        return x
    return x.detach().clone().requires_grad_(x.requires_grad and not function.name().endswith("backward"))


@pytest.mark.parametrize("case", CASES[:4], ids=str)
def test_opcheck_accepts_every_op_as_it_is_called(case):
    calls = recorded_calls(case)
    elsewhere = ("dense_attention", "decode_step", "token_importance", "soft_cut", "with_sinks")  # tested elsewhere
    check_ops(calls, registered_ops().difference(*map(registered_ops, elsewhere)))


@pytest.mark.parametrize("needs_dbias", [False, True], ids=["constant-bias", "bias"])
def test_opcheck_accepts_the_ops_of_masks_and_biases(needs_dbias):
    query, key, value = (torch.randn(2, 7, heads, 8, requires_grad=True) for heads in (4, 2, 2))
    mask, bias = torch.rand(1, 2, 7, 7) > 0.4, torch.randn(2, 1, 7, 1, requires_grad=needs_dbias)
    with RecordCalls() as recorder:
        out, lse = dense_attention(query, key, value, mask, bias, is_causal=True, softcap=2.0)
        (out.sum() + lse.masked_fill(lse.isinf(), 0).sum()).backward()
    check_ops(recorder.calls, registered_ops("dense_attention"))


def check_ops(calls, expected):
    assert {function.name() for function, _, _ in calls} == expected != set()
    for function, args, kwargs in calls:
        args = tuple(as_leaf(x, function) for x in args)
        torch.library.opcheck(function, args, {name: as_leaf(x, function) for name, x in kwargs.items()})


@pytest.mark.parametrize("case", CASES, ids=str)
def test_fake_tensors_have_the_shapes_types_and_strides_of_real_ones(case):
    from torch._subclasses.fake_tensor import FakeTensorMode

    inputs = case.inputs()
    real = dynamic_mask_attention(*inputs, **case.options, return_lse=True)
    with FakeTensorMode() as mode:
        options = {name: mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for name, x in case.options.items()}
        fake = dynamic_mask_attention(*(mode.from_tensor(x) for x in inputs), **options, return_lse=True)
    for mine, right in zip(fake, real, strict=True):
        assert (mine.shape, mine.dtype, mine.stride()) == (right.shape, right.dtype, right.stride())


def test_meta_tensors_pass_through():
    inputs = [x.to("meta") for x in AttentionCase("meta").inputs()]
    out = dynamic_mask_attention(*inputs, **window(7, 1, 2))
    assert out.device.type == "meta" and out.shape == inputs[0].shape


def loss_and_gradients(function, case, inputs):
    leaves = [x.detach().requires_grad_() for x in inputs]
    out, lse = function(*leaves, **case.options, return_lse=True)
    loss = out.square().sum() + lse.masked_fill(lse == -math.inf, 0).sum()
    return out, lse, *torch.autograd.grad(loss, leaves, materialize_grads=True)


@pytest.mark.parametrize(
    ("case", "backend"),
    [*((case, "aot_eager") for case in CASES), *((case, "eager") for case in CASES[::3])],
    ids=str,
)
def test_compiled_without_a_graph_break_it_gives_the_same(case, backend):
    torch._dynamo.reset()
    inputs = case.inputs()
    compiled = torch.compile(dynamic_mask_attention, fullgraph=True, backend=backend)
    for got, expected in zip(
        loss_and_gradients(compiled, case, inputs),
        loss_and_gradients(dynamic_mask_attention, case, inputs),
        strict=True,
    ):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("lengths", [(17, 40, 26), (9, 12, 7)], ids=["beyond-the-window", "within-the-window"])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_once_it_serves_every_length(backend, lengths):
    torch._dynamo.reset()
    compiled = torch.compile(dynamic_mask_attention, fullgraph=True, backend=backend, dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seqlen in lengths:
            case = AttentionCase("dynamic", seqlen_q=seqlen, seqlen_k=seqlen, options=window(12, 1, 2))
            inputs = case.inputs()
            for got, expected in zip(
                loss_and_gradients(compiled, case, inputs),
                loss_and_gradients(dynamic_mask_attention, case, inputs),
                strict=True,
            ):
                torch.testing.assert_close(got, expected)


def test_the_parts_compile_too():
    torch._dynamo.reset()
    query, key, value, importance = AttentionCase("parts", seqlen_q=4).inputs()
    positions = torch.randperm(46)[:23].int().expand(2, 1, 23).contiguous()
    starts = torch.tensor([40, 13], dtype=torch.int32)

    def step(query, key, value, importance, positions, starts):
        visibility = select_visible(importance, keep_window_size=9, local_window_size=3, positions=positions)
        return interval_attention(query, key, value, importance, visibility, query_start=starts)

    arguments = (query, key, value, importance, positions, starts)
    torch.testing.assert_close(torch.compile(step, fullgraph=True, backend="aot_eager")(*arguments), step(*arguments))


def make_tensors():
    query, key, value = (torch.randn(2, 7, heads, 8, dtype=torch.float64) for heads in (4, 2, 2))
    return [x.requires_grad_() for x in (query, key, value, torch.randn(2, 2, 7, dtype=torch.float64))]


@pytest.mark.parametrize(
    "attend",
    [
        lambda query, key, value, bias: dynamic_mask_attention(query, key, value, bias, keep_window_size=3),
        lambda query, key, value, bias: dense_attention(query, key, value, None, bias[:, :, None] + torch.zeros(7, 1))[
            0
        ],
    ],
    ids=["interval", "dense"],
)
def test_a_second_derivative_is_refused(attend):
    inputs = make_tensors()
    first = torch.autograd.grad(attend(*inputs).square().sum(), inputs, create_graph=True)
    assert all(map(torch.equal, first, torch.autograd.grad(attend(*inputs).square().sum(), inputs)))
    with pytest.raises(RuntimeError, match="no second derivative|no autograd formula"):
        torch.autograd.grad(first[0].sum(), inputs)


@pytest.mark.parametrize("wanted", [(0, 1, 2, 3), (1,), (0, 3)], ids=str)
def test_eager_calls_have_the_gradients_of_the_operator(wanted):
    inputs = make_tensors()
    for index, tensor in enumerate(inputs):
        tensor.requires_grad_(index in wanted)
    visibility = select_visible(inputs[3].detach(), keep_window_size=3)
    call = AttentionCall.prepare(*inputs, visibility, max_visible=3, softmax_scale=0.3)
    results = []
    for out, lse, *_ in (run_attention(call, "reference"), interval_attention_op(*call.flatten(), "reference")):
        wrt = [inputs[index] for index in wanted]
        results.append((out, lse, *torch.autograd.grad(out.square().sum() + lse.sum(), wrt)))
    assert all(map(torch.equal, *results))


def test_a_call_past_the_operator_equals_it_and_a_profiler_sees_the_operator():
    inputs = [tensor.detach() for tensor in make_tensors()]
    call = AttentionCall.prepare(*inputs, select_visible(inputs[3], keep_window_size=3))
    with torch.no_grad():
        assert can_call_directly(*inputs)
        results = run_attention(call, "reference")
        assert all(map(torch.equal, results, interval_attention_op(*call.flatten(), "reference")))
        with torch.profiler.profile() as profile:
            run_attention(call, "reference")
    assert "flash_dmattn::interval_attention" in {event.name for event in profile.events()}


def test_the_operator_is_called_where_somebody_would_miss_it():
    tensor, found = torch.zeros(2), []
    assert not can_call_directly(tensor)  # gradients are enabled
    with torch.no_grad():
        assert can_call_directly(tensor, None)
        assert not can_call_directly(tensor.to("meta"))
        assert not can_call_directly(tensor, tensor.as_subclass(type("Subclass", (torch.Tensor,), {})))
        with RecordCalls():
            assert not can_call_directly(tensor)
        torch.vmap(lambda part: found.append(can_call_directly(part)) or part)(tensor)
    assert found == [False]


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
def test_it_maps_over_a_batch_with_and_without_gradients():
    query, key, importance = torch.randn(3, 2, 20, 4, 8), torch.randn(2, 20, 3, 2, 8), torch.randn(2, 2, 20)

    def attend(query, key):
        return dynamic_mask_attention(query, key, key, importance, keep_window_size=5)

    def loss(query, key):
        return attend(query, key).square().sum()

    out = torch.vmap(attend, in_dims=(0, 2))(query, key)
    dquery = torch.vmap(torch.func.grad(loss), in_dims=(0, 2))(query, key)
    for number in range(3):
        one = query[number].clone().requires_grad_()
        expected = attend(one, key[:, :, number])
        torch.testing.assert_close(out[number], expected)
        torch.testing.assert_close(dquery[number], torch.autograd.grad(expected.square().sum(), one)[0])
