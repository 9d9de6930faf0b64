"""Attention under any mask and bias, of every backend, against its definition; small shapes in Triton's interpreter."""

from dataclasses import replace

import pytest
import torch

from flash_dmattn.dense import attention
from flash_dmattn.dense.attention import dense_attention
from flash_dmattn.utils.mask import tile_mask

from .dense_cases import CASES, GPU_CASES, DenseCase, check, make_inputs, run
from .kernel_cases import DEVICE, HAS_GPU

INTERPRETED = ("kv-heads", "query-heads", "one-for-all-deterministic", "bias-by-key", "bias-only-causal")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_reference_equals_the_definition(case, seed):
    check(case, seed, "reference")
    check(replace(case, seqlen_q=1), seed, "reference")


@pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")
@pytest.mark.parametrize("case", [case for case in CASES if HAS_GPU or case.name in INTERPRETED], ids=str)
def test_the_triton_kernels_equal_the_definition(case, seed):
    pytest.importorskip("triton", reason="Triton is published for Linux only")
    if not HAS_GPU:  # tiles are of 32 x 32 there: two of them each way, and an edge
        case = replace(case, seqlen_q=34, seqlen_k=50, num_heads=2, num_kv_heads=1 if case.mask == "bkqs" else 2)
    check(case, seed, "triton")


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU, reason="needs a CUDA GPU: half precision and large shapes")
@pytest.mark.parametrize("case", GPU_CASES, ids=str)
def test_the_triton_kernels_equal_the_definition_in_half_precision(case, seed):
    check(case, seed, "cuda")


@pytest.mark.filterwarnings("ignore:flex_attention called without:UserWarning")
@pytest.mark.parametrize("case", CASES[::2], ids=str)
def test_flex_honours_the_mask(case, seed):
    inputs = make_inputs(case, seed)
    query, key, value, bias = inputs["tensors"]
    options = {**case.options(), "deterministic": False}
    results = [
        dense_attention(query, key, value, inputs["mask"], bias, **options, backend=backend)
        for backend in ("flex", "reference")
    ]
    torch.testing.assert_close(*results, atol=1e-5, rtol=1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU, reason="needs a CUDA GPU: FlexAttention has no backward on a CPU")
@pytest.mark.parametrize("case", [case for case in GPU_CASES if case.name.startswith("large-kv-heads")], ids=str)
def test_flex_has_gradients_on_a_gpu(case, seed):
    check(case, seed, "flex")


def test_flex_refuses_gradients_on_a_cpu():
    query = torch.randn(1, 8, 2, 16, requires_grad=True)
    with pytest.raises(RuntimeError, match="no backward on the CPU"):
        dense_attention(query, query, query, backend="flex")


@pytest.mark.parametrize("backend", ["reference", *(["triton"] if HAS_GPU else [])])
def test_a_deterministic_backward_is_bitwise_equal(backend, seed):
    case = next(case for case in CASES if case.name == "one-for-all-deterministic")

    def attention(*tensors, **options):
        return dense_attention(*tensors, **options, backend=backend)

    for first, second in zip(run(attention, case, seed), run(attention, case, seed), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("backend", ["reference", *(["triton"] if HAS_GPU else [])])
def test_nan_and_infinite_biases(backend):
    query, key, value = torch.randn(3, 1, 6, 1, 16, device=DEVICE)
    bias = torch.randn(1, 1, 6, 6, device=DEVICE)
    bias[0, 0, :, 1] = torch.nan
    bias[0, 0, :, 2] = -torch.inf
    bias[0, 0, 3] = -torch.inf
    bias[0, 0, 4, 5] = torch.inf
    bias.requires_grad_()
    out, lse = dense_attention(query, key, value, None, bias, backend=backend)
    out.sum().backward()
    seen = torch.tensor([0, 3, 4, 5], device=DEVICE)
    expected, _ = dense_attention(query[:, :1], key[:, seen], value[:, seen], None, bias[:, :, :1, seen].detach())
    torch.testing.assert_close(out[:, :1], expected)
    assert (out[0, 3] == 0).all() and lse[0, 0, 3].isneginf()
    torch.testing.assert_close(out[0, 4], value[0, 5])
    assert bias.grad.isfinite().all() and (bias.grad[0, 0, :, 1:3] == 0).all() and (bias.grad[0, 0, 3] == 0).all()


@pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("layout", ["bytes", "words", "numbers", "transposed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_tiles_are_empty_partial_or_full(dtype, layout, is_causal, seed):
    pytest.importorskip("triton", reason="Triton is published for Linux only")
    seqlen_q, seqlen_k = 70, 302 if layout == "bytes" else 300
    query, key = (torch.zeros(1, n, 2, 16, dtype=dtype, device=DEVICE) for n in (seqlen_q, seqlen_k))
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(1, 2, seqlen_q, seqlen_k, generator=generator) < 0.99
    mask[..., 32:64], mask[..., 64:160] = False, True
    mask = mask.to(DEVICE, torch.float16 if layout == "numbers" else torch.bool)
    if layout == "transposed":
        mask = mask.mT.contiguous().mT
    tiles = tile_mask(query, key, mask, is_causal=is_causal).tiles
    rows, keys = (-(-n // count) for n, count in zip((seqlen_q, seqlen_k), tiles.shape[2:], strict=True))
    rows, keys = (1 << (size - 1).bit_length() for size in (rows, keys))
    visible = (mask != 0).tril(seqlen_k - seqlen_q) if is_causal else mask != 0
    for row in range(tiles.shape[2]):
        for column in range(tiles.shape[3]):
            tile = visible[..., row * rows : (row + 1) * rows, column * keys : (column + 1) * keys].flatten(2)
            is_full = tile.all(-1) & (column * keys + keys <= seqlen_k)
            assert torch.equal(tiles[..., row, column].long(), tile.any(-1).long() + is_full), (row, column)
    assert set(tiles.unique().tolist()) == {0, 1, 2}


@pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")
def test_a_mask_that_is_tiled_is_not_read_for_its_tiles_again(monkeypatch, seed):
    pytest.importorskip("triton", reason="Triton is published for Linux only")
    from flash_dmattn.dense import tiles

    case = DenseCase("tiled", seqlen_q=34, seqlen_k=50, num_kv_heads=4, mask="kqs", is_causal=True)

    def plain(*tensors, **options):
        return dense_attention(*tensors, **options, backend="triton")

    def tiled(query, key, value, mask, bias, **options):
        mask = tile_mask(query, key, mask, is_causal=options["is_causal"])
        assert set(mask.tiles.unique().tolist()) >= {0, 1}
        monkeypatch.setattr(tiles, "_classify", None)
        return plain(query, key, value, mask, bias, **options)

    for expected, got in zip(run(plain, case, seed), run(tiled, case, seed), strict=True):
        assert torch.equal(expected, got)


def test_a_tiled_mask_serves_engines_that_have_no_tiles():
    query, key = torch.randn(2, 1, 20, 2, 16)
    mask = torch.rand(1, 1, 20, 20) < 0.5
    tiled = tile_mask(query, key, mask, is_causal=True)
    options = {"is_causal": True, "backend": "reference"}
    expected, _ = dense_attention(query, key, key, mask, **options)
    assert torch.equal(dense_attention(query, key, key, tiled, **options)[0], expected)
    with pytest.raises(ValueError, match="is_causal must be True"):
        dense_attention(query, key, key, tiled, backend="reference")
    mask[0, 0, 3] = True
    with pytest.raises(ValueError, match="must not change"):
        dense_attention(query, key, key, tiled, **options)


def test_tiles_of_another_length_are_refused():
    pytest.importorskip("triton", reason="Triton is published for Linux only")
    query = torch.randn(1, 40, 2, 16, device=DEVICE)
    tiled = tile_mask(query, query, torch.ones(1, 1, 40, 40, dtype=torch.bool, device=DEVICE))
    other = replace(tiled, attn_mask=tiled.attn_mask.new_ones(1, 1, 70, 70), version=0)
    query = torch.randn(1, 70, 2, 16, device=DEVICE)
    with pytest.raises(ValueError, match="its tiles must have shape"):
        dense_attention(query, query, query, other, backend="triton")


def test_masks_without_rows_take_the_interval_engine(monkeypatch):
    from flash_dmattn.dense import attention

    def refuse(*_):
        raise AssertionError("the dense op was called")

    monkeypatch.setattr(attention, "dense_attention_op", refuse)
    query = torch.randn(1, 40, 4, 16)
    key = torch.randn(1, 60, 2, 16)
    mask = torch.rand(1, 2, 1, 60) > 0.5
    for given in (mask, mask.expand(1, 2, 40, 60), mask.repeat_interleave(2, dim=1), None):
        for bias in (torch.randn(1, 1, 1, 60), torch.randn(1, 4, 1, 1), None):
            for is_causal in (False, True):
                out, _ = dense_attention(query, key, key, given, bias, is_causal=is_causal)
                assert out.isfinite().all()
    with pytest.raises(AssertionError, match="dense op"):
        dense_attention(query, key, key, mask.expand(1, 2, 40, 60).clone())


@pytest.mark.parametrize("mask", ["some", "none"])
def test_visible_keys_of_long_masks_are_counted(mask, monkeypatch):
    monkeypatch.setattr(attention, "_LONGEST_UNCOUNTED", 8)
    visible = torch.zeros(2, 2, 1, 30, dtype=torch.bool)
    if mask == "some":
        visible[0, 1, :, ::4] = True
    assert attention._max_visible(visible[:, :, 0]) == (8 if mask == "some" else 1)
    query, key, value = torch.randn(2, 30, 4, 16), *torch.randn(2, 2, 30, 2, 16)
    counted = dense_attention(query, key, value, visible, is_causal=True)
    written = dense_attention(query, key, value, visible.expand(2, 2, 30, 30), is_causal=True)
    for ours, theirs in zip(counted, written, strict=True):
        torch.testing.assert_close(ours, theirs)
