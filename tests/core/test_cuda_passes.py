"""The passes of the CUDA library give each kernel what it needs, by plan and the long way, without a GPU."""

from dataclasses import replace

import pytest
import torch
import torch.utils.checkpoint

import flash_dmattn
from flash_dmattn import planned
from flash_dmattn.backends.cuda import library
from flash_dmattn.backends.cuda.attention_plan import AttentionPlan
from flash_dmattn.backends.cuda.head_dims import cut_rows, fill_rows, kernel_dim

from .attention_cases import documents
from .kernel_cases import DEVICE, make_inputs, options, scattered, tiled
from .played_library import PlayedLibrary, compile_library

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="with a GPU the library itself is tested")

DETERMINISTIC = tiled("deterministic", options=options(deterministic=True))
SELECTED, DENSE = options(), options(keep_window_size=500)
CASES = [
    tiled("selected", options=SELECTED),
    tiled("dense", options=DENSE),
    tiled("dense-fewer-queries", seqlen_q=37, seqlen_k=200, options=DENSE),
    tiled("fewer-queries", batch=2, seqlen_q=37, seqlen_k=200, num_heads=6, num_kv_heads=2, options=SELECTED),
    tiled("per-query-head", num_heads=4, num_kv_heads=2, num_importance_heads=4, options=SELECTED),
    tiled("no-bias", options=options(add_importance_bias=False)),
    tiled("dense-no-bias", options=options(keep_window_size=500, add_importance_bias=False)),
    tiled("dense-not-finite", importance="infinite-ties", options=DENSE),
    tiled("not-finite", importance="infinite-ties", options=SELECTED),
    tiled("softcap-and-scale", options=options(softcap=2.0, softmax_scale=0.3)),
    tiled("not-causal", options=options(is_causal=False, local_window_size=0)),
    tiled("sliding-window", batch=2, options=options(sliding_window=20)),
    tiled("dense-sliding-window", options=options(keep_window_size=500, sliding_window=20)),
    DETERMINISTIC,
    tiled("one-token", seqlen_q=1, seqlen_k=1, options=options(keep_window_size=500)),
    tiled("importance-bfloat16", importance_dtype=torch.bfloat16, options=SELECTED),
]
FILLED_UP = [
    tiled("filled-up", seqlen_q=37, seqlen_k=200, num_heads=6, num_kv_heads=2, head_dim=80, options=SELECTED),
    tiled("filled-up-dense", head_dim=80, options=DENSE),
    tiled("filled-up-padded", batch=2, head_dim=72, options=options(padding_mask=scattered(2, 150), softcap=2.0)),
    tiled("filled-up-packed", head_dim=112, options=options(cu_seqlens=documents(3, 0, 47, 1, 99))),
    tiled("filled-up-not-aligned", head_dim=75, options=SELECTED),
    tiled("filled-up-values-shorter", head_dim=80, value_dim=64, options=SELECTED),
    tiled("filled-up-values-longer", head_dim=80, value_dim=100, options=options(add_importance_bias=False)),
]
UNPLANNED = [
    tiled("padded", batch=2, options=options(padding_mask=scattered(2, 150))),
    tiled("packed", options=options(cu_seqlens=documents(3, 0, 47, 1, 99))),
    tiled("importance-of-all-heads", num_heads=4, num_kv_heads=2, num_importance_heads=1, options=SELECTED),
    tiled("values-shorter", head_dim=128, value_dim=64, options=SELECTED),
    tiled("values-longer", head_dim=96, value_dim=128, options=SELECTED),
    tiled("values-not-aligned", head_dim=128, value_dim=60, options=SELECTED),
    *FILLED_UP,
    tiled("no-token", seqlen_q=0, seqlen_k=0, options=SELECTED),
]
COPIES = {
    "contiguous": lambda tensor: tensor.clone(memory_format=torch.contiguous_format),
    "with-gaps": lambda tensor: torch.stack([tensor, tensor * 0], -1)[..., 0],
    "not-aligned": lambda tensor: torch.cat([tensor.new_zeros(1), tensor.flatten()])[1:].view(tensor.shape),
}
"""What may come back in a backward for a tensor that was saved. The library itself takes the first alone."""


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    return compile_library(tmp_path_factory.mktemp("library"))


@pytest.fixture
def played(request, loaded, monkeypatch):
    stand_in = PlayedLibrary(loaded)
    stand_in.install(monkeypatch, is_for_sm90a=request.param == "sm90")
    return stand_in


def suited(case):
    """The case in a shape that the CUDA library serves."""
    return replace(case, head_dim=max(case.head_dim, 64), dtype=torch.bfloat16)


def results(case, seed, backend, *, needs_lse=True):
    """Returns out, lse and the gradients of one call."""
    inputs, chosen, weights = make_inputs(suited(case), seed)
    inputs = [tensor.requires_grad_() for tensor in inputs]
    outputs = flash_dmattn.dynamic_mask_attention(*inputs, **chosen, return_lse=needs_lse, backend=backend)
    out = outputs[0] if needs_lse else outputs
    loss = (out.double() * weights[..., :-1]).sum()
    if needs_lse:
        loss = loss + (outputs[1].masked_fill(outputs[1].isneginf(), 0) * weights[..., -1].transpose(1, 2)).sum()
    gradients = torch.autograd.grad(loss, inputs, allow_unused=True)
    return [
        None if result is None else result.detach() for result in (out, outputs[1] if needs_lse else None, *gradients)
    ]


def assert_same(first, second, **tolerance):
    for name, one, other in zip(("out", "lse", *"qkvs"), first, second, strict=True):
        assert (one is None) == (other is None), name
        if one is not None:
            torch.testing.assert_close(one, other, **tolerance, msg=lambda text, name=name: f"{name}: {text}")


EQUAL = {"rtol": 0, "atol": 0}


def on_both(*cases):
    """Every case with the kernels of both kinds, except that those for sm80 leave deterministic gradients to Triton."""
    kinds = {DETERMINISTIC.name: ("sm90",)}
    pairs = [(case, kind) for case in cases for kind in kinds.get(case.name, ("sm90", "sm80"))]
    return pytest.mark.parametrize(("case", "played"), pairs, ids=str, indirect=["played"])


@on_both(*CASES, *UNPLANNED)
def test_kernels_get_what_the_call_says(case, played, seed):
    expected = results(case, seed, "reference")
    if case.importance == "infinite-ties":
        expected[1] = None  # of the order of the largest float32, and nothing more is promised
    for _ in ("the long way", "by plan"):
        got = results(case, seed, "cuda")
        got[1] = None if expected[1] is None else got[1]
        assert_same(got, expected, rtol=2e-2, atol=2e-2)


@on_both(*CASES)
def test_a_plan_gives_the_bits_of_the_long_way(case, played, seed, monkeypatch):
    with monkeypatch.context() as without:
        without.setattr(planned, "DEVICES", set())
        long_way = results(case, seed, "cuda"), results(case, seed, "cuda", needs_lse=False)
        launches, played.launches = played.launches, []
        assert not planned._ROUTES
    results(case, seed, "cuda")
    played.launches.clear()
    monkeypatch.setattr(flash_dmattn.attention, "attend", None)
    monkeypatch.setattr(AttentionPlan, "restore", None)
    assert_same(results(case, seed, "cuda"), long_way[0], **EQUAL)
    assert_same(results(case, seed, "cuda", needs_lse=False), long_way[1], **EQUAL)
    assert played.launches == launches


@on_both(*CASES)
def test_a_plan_without_gradients_gives_the_same(case, played, seed):
    inputs, chosen, _ = make_inputs(suited(case), seed)
    with torch.no_grad():
        first, *others = [
            flash_dmattn.dynamic_mask_attention(*inputs, **chosen, return_lse=needs_lse, backend="cuda")
            for needs_lse in (True, True, False)
        ]
    assert torch.equal(others[0][0], first[0]) and torch.equal(others[0][1], first[1])
    assert torch.equal(others[1], first[0])


@on_both(CASES[0])
def test_the_first_call_saves_what_later_ones_save(case, played, seed):
    """Non-reentrant checkpoints compare what is saved in the forward, without a plan yet, and in the recomputation."""
    inputs, chosen, _ = make_inputs(suited(case), seed)
    inputs = [tensor.requires_grad_() for tensor in inputs]

    def attend(*tensors):
        return flash_dmattn.dynamic_mask_attention(*tensors, **chosen, backend="cuda")

    assert not planned._ROUTES
    out = torch.utils.checkpoint.checkpoint(attend, *inputs, use_reentrant=False)
    gradients = torch.autograd.grad(out.double().square().sum(), inputs)
    expected = torch.autograd.grad(attend(*inputs).double().square().sum(), inputs)
    assert all(torch.equal(*pair) for pair in zip(gradients, expected, strict=True))


@pytest.mark.parametrize("copy", COPIES)
@on_both(CASES[0], CASES[1])
def test_saved_tensors_may_come_back_with_other_strides_and_addresses(case, played, copy, seed, monkeypatch):
    inputs, chosen, weights = make_inputs(suited(case), seed)
    leaves = [tensor.transpose(1, 2).contiguous().requires_grad_() for tensor in inputs]

    def gradients():
        inputs = [leaf.transpose(1, 2) for leaf in leaves]
        out, lse = flash_dmattn.dynamic_mask_attention(*inputs, **chosen, return_lse=True)
        played.launches.clear()
        loss = (out.double() * weights[..., :-1]).sum() + (lse * weights[..., -1].transpose(1, 2)).sum()
        return torch.autograd.grad(loss, leaves)

    with monkeypatch.context() as without:
        without.setattr(planned, "DEVICES", set())
        expected = gradients()
    for _ in range(2):
        with torch.autograd.graph.saved_tensors_hooks(COPIES[copy], lambda tensor: tensor):
            got = gradients()
        for one, other in zip(got, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=2e-2, atol=2e-2)
        assert any("backward" in part for part in played.launches) == (copy == "contiguous")
    assert None not in planned._ROUTES.values() and planned._ROUTES


@pytest.mark.parametrize("is_planned", [True, False])
@on_both(CASES[0])
def test_kernels_get_aligned_rows_of_out_and_its_gradient(case, played, is_planned, seed, monkeypatch):
    if not is_planned:
        monkeypatch.setattr(planned, "DEVICES", set())
    inputs, chosen, weights = make_inputs(suited(case), seed)
    inputs = [tensor.requires_grad_() for tensor in inputs]
    dout = weights[..., :-1].bfloat16()

    def unaligned_out(tensor):
        is_out = tensor.shape == dout.shape and tensor.data_ptr() != inputs[0].data_ptr()
        return COPIES["not-aligned"](tensor) if is_out else tensor

    out = flash_dmattn.dynamic_mask_attention(*inputs, **chosen, backend="cuda")
    expected = torch.autograd.grad(out, inputs, dout, retain_graph=True)
    got = torch.autograd.grad(out, inputs, COPIES["not-aligned"](dout))
    assert all(torch.equal(*pair) for pair in zip(got, expected, strict=True))
    with torch.autograd.graph.saved_tensors_hooks(unaligned_out, lambda tensor: tensor):
        out = flash_dmattn.dynamic_mask_attention(*inputs, **chosen, backend="cuda")
    got = torch.autograd.grad(out, inputs, dout)
    assert all(torch.equal(*pair) for pair in zip(got, expected, strict=True))


@on_both(CASES[0], CASES[1])
def test_a_planned_gradient_has_no_gradient_itself(case, played, seed):
    """It is computed the long way where somebody wants to differentiate it, and then refuses."""
    inputs, chosen, _ = make_inputs(suited(case), seed)
    inputs = [tensor.requires_grad_() for tensor in inputs]
    for _ in range(2):
        out = flash_dmattn.dynamic_mask_attention(*inputs, **chosen, backend="cuda")
        loss = out.double().square().sum()
        expected = torch.autograd.grad(loss, inputs, retain_graph=True)
        got = torch.autograd.grad(loss, inputs, create_graph=True)
        assert all(torch.equal(*pair) for pair in zip(got, expected, strict=True))
        with pytest.raises(RuntimeError, match="no second derivative"):
            torch.autograd.grad(got[0].double().sum(), inputs[0])


@on_both(*UNPLANNED)
def test_other_calls_go_the_long_way(case, played, seed):
    results(case, seed, "cuda")
    assert set(planned._ROUTES.values()) <= {None}


@pytest.mark.parametrize("played", ["sm90", "sm80"], indirect=True)
def test_rows_are_filled_up_to_the_next_kernel_unless_most_of_it_were_zeros(played):
    assert [kernel_dim(head_dim) for head_dim in (31, 32, 64, 65, 128, 129)] == [None, 64, 64, 128, 128, None]
    for head_dim, words in ((31, "none of them is from 31 to twice as much"), (129, r"head dims \(64, 128\)")):
        query = torch.zeros(1, 4, 2, head_dim, dtype=torch.bfloat16)
        with pytest.raises(RuntimeError, match=words):
            flash_dmattn.interval_attention(query, query, query, None, None, backend="cuda")


def test_what_stands_behind_a_row_is_zero(monkeypatch):
    monkeypatch.setattr(library, "head_dims", lambda: (64, 128))
    rows = torch.randn(2, 7, 3, 80).transpose(1, 2)
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda tensor, *sizes: tensor.new_full(sizes, torch.nan))
    filled = fill_rows(rows)
    assert filled.is_contiguous() and torch.equal(filled[..., :80], rows) and torch.equal(cut_rows(filled, 80), rows)
    assert filled.shape == (2, 3, 7, 128) and not filled[..., 80:].any()


@on_both(*FILLED_UP)
def test_filled_up_rows_are_neither_returned_nor_saved(case, played, seed):
    (query, key, value, importance), chosen, _ = make_inputs(suited(case), seed)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor.shape) or tensor, lambda t: t):
        out = flash_dmattn.dynamic_mask_attention(
            query.requires_grad_(), key, value, importance, **chosen, backend="cuda"
        )
    assert {"forward"} == set(played.launches) - {"select", "lists"}
    own = max(case.head_dim, value.shape[3])
    assert out.shape == (*query.shape[:3], value.shape[3])
    assert query.shape[:3] + (own,) in saved
    assert kernel_dim(own) not in {shape[-1] for shape in saved}
