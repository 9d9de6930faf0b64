"""Whole models on a GPU, through the Triton kernels: compiled, autocast, checkpointed, decoded, trained in chunks."""

import pytest
import torch

from flash_dmattn_hf import DynamicMaskCache, iter_gates
from flash_dmattn_hf.training import liger
from flash_dmattn_hf.training.loss import use_chunked_loss

from ..gpu_models import LENGTH, WINDOW, make_batch, make_model, make_tokens, train

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU: inductor and compiled Triton kernels"),
]
BATCHES = ["plain", "padded", "packed"]


@pytest.fixture(autouse=True)
def triton_engine(monkeypatch):
    monkeypatch.setenv("FLASH_DMATTN_BACKEND", "triton")
    torch.compiler.reset()


def compiled(model):
    return torch.compile(model, fullgraph=True)


def test_a_compiled_forward_equals_the_eager_one():
    model, batch = make_model(), make_batch("padded")
    with torch.no_grad():
        expected, got = model(**batch), compiled(model)(**batch)
    torch.testing.assert_close(got.logits, expected.logits, atol=2e-4, rtol=2e-4)
    torch.testing.assert_close(got.loss, expected.loss, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("kind", "chunked"),
    [("plain", False), ("padded", False), ("packed", True)],
    ids=["plain", "padded", "packed with the chunked loss"],
)
def test_compiled_training_equals_eager_training(kind, chunked):
    model, batch = make_model(), make_batch(kind)
    losses, weights = train(model, batch)
    if chunked:
        use_chunked_loss(model, chunk_size=100)
    compiled_losses, compiled_weights = train(model, batch, run=compiled)
    assert losses[-1] < losses[0] - 0.05
    assert compiled_losses == pytest.approx(losses, abs=1e-4)
    torch.testing.assert_close(compiled_weights, weights, atol=2e-4, rtol=2e-3)


@pytest.mark.parametrize(
    ("kind", "run"),
    [*((kind, None) for kind in BATCHES), ("packed", compiled)],
    ids=[*BATCHES, "packed, compiled"],
)
def test_bf16_autocast_stays_near_float32(kind, run):
    model, batch = make_model(), make_batch(kind)
    seen = []
    for _, _, gate in iter_gates(model):
        gate.register_forward_hook(lambda module, args, importance: seen.append(importance.dtype))
    losses, _ = train(model, batch, run=run)
    autocast_losses, weights = train(model, batch, run=run, autocast=True)
    assert autocast_losses == pytest.approx(losses, abs=0.05)
    assert set(seen) == {torch.float32}
    assert all(weight.dtype == torch.float32 and weight.isfinite().all() for weight in weights.values())


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [*((kind, torch.float32) for kind in BATCHES), ("packed", torch.bfloat16)],
    ids=[*BATCHES, "packed, bf16"],
)
def test_gradient_checkpointing_changes_nothing(kind, dtype):
    model, batch = make_model(dtype), make_batch(kind)
    losses, weights = train(model, batch)
    model.gradient_checkpointing_enable()
    checkpointed_losses, checkpointed_weights = train(model, batch)
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    assert checkpointed_losses == pytest.approx(losses, abs=tolerance)
    torch.testing.assert_close(checkpointed_weights, weights, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize(
    ("kind", "engine"), [*((kind, "torch") for kind in BATCHES), ("padded", "liger")], ids=[*BATCHES, "padded, liger"]
)
def test_the_chunked_loss_equals_the_whole_one(kind, engine):
    if engine == "liger" and not liger.is_installed():
        pytest.skip("needs liger-kernel")
    model, batch = make_model(), make_batch(kind)
    losses, weights = train(model, batch)
    use_chunked_loss(model, chunk_size=100, engine=engine)
    chunked_losses, chunked_weights = train(model, batch)
    assert chunked_losses == pytest.approx(losses, abs=1e-4)
    torch.testing.assert_close(chunked_weights, weights, atol=2e-4, rtol=2e-3)


@torch.no_grad()
def in_pieces(model, input_ids, sizes):
    """Logits of all tokens, computed through a cache, and the most keys that a head ever kept."""
    cache, logits, most = DynamicMaskCache(model), [], 0
    for piece in input_ids.split(sizes, dim=1):
        logits.append(model(piece, past_key_values=cache).logits)
        most = max(most, cache.max_keys)
    return torch.cat(logits, dim=1), most


PIECES = {
    "uneven chunks": [150, 90, 60],
    "prefill and decode": [280, *[1] * (LENGTH - 280)],
}


@pytest.mark.parametrize("sizes", PIECES.values(), ids=PIECES.keys())
def test_a_cache_changes_nothing_in_float32(sizes):
    model, input_ids = make_model(), make_tokens(2)
    with torch.no_grad():
        expected = model(input_ids, use_cache=False).logits
    got, most = in_pieces(model, input_ids, sizes)
    torch.testing.assert_close(got, expected, atol=5e-4, rtol=5e-4)
    assert most <= WINDOW["keep_window_size"]


@pytest.mark.parametrize("sizes", PIECES.values(), ids=PIECES.keys())
def test_a_cache_rounds_no_worse_than_one_pass_in_bf16(sizes):
    model, input_ids = make_model(torch.bfloat16), make_tokens(2)
    in_float32 = make_model()
    in_float32.load_state_dict(model.state_dict())
    with torch.no_grad():
        exact = in_float32(input_ids, use_cache=False).logits
        one_pass = model(input_ids, use_cache=False).logits
    got, most = in_pieces(model, input_ids, sizes)
    error, allowed = ((logits - exact).norm() / exact.norm() for logits in (got, one_pass))
    assert error <= 1.5 * allowed <= 0.3
    assert most <= WINDOW["keep_window_size"]


def test_generation_gives_the_tokens_of_the_reference_engine(monkeypatch):
    model, input_ids = make_model(), make_tokens(2, 150)
    mask = torch.ones_like(input_ids)
    mask[0, :40] = 0
    options = {"attention_mask": mask, "max_new_tokens": 20, "do_sample": False}
    got = model.generate(input_ids, **options)
    monkeypatch.setenv("FLASH_DMATTN_BACKEND", "reference")
    assert torch.equal(got, model.generate(input_ids, **options))
