"""Equal tokens tie: equal values give equal importances in a batch of any shape, so with and without a cache."""

from pathlib import Path

import pytest
import torch

from flash_dmattn_hf import DynamicMaskCache, iter_gates
from flash_dmattn_hf.forms import FORMS

from ..converted import converted

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


def first_gate(model):
    return next(gate for _, _, gate in iter_gates(model))


@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (1, 333), (40, 9)], ids=str)
@pytest.mark.parametrize("source", ["value", "hidden"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@torch.no_grad()
def test_equal_tokens_have_equal_importances_in_a_batch_of_any_shape(dtype, form, source, shape):
    gate = first_gate(converted(importance=form, importance_input=source).to(dtype))
    heads, dim = gate.source_shape
    tokens = torch.randn(heads, 50, dim, dtype=dtype, generator=torch.Generator().manual_seed(0))
    which = torch.randint(0, 50, shape, generator=torch.Generator().manual_seed(1))
    expected = gate(tokens[None])[0]
    assert torch.equal(gate(tokens[:, which].transpose(0, 1)), expected[:, which].transpose(0, 1))


@torch.no_grad()
def test_a_cache_keeps_the_keys_that_one_forward_sees_in_a_text_that_repeats_itself():
    """The values of equal tokens differ in bits beyond those that importances are rounded to."""
    model, seen = converted(), []
    first_gate(model).register_forward_hook(lambda module, args, importance: seen.append(importance))
    for seed in range(4):
        ids = torch.randint(3, 15, (1, 48), generator=torch.Generator().manual_seed(seed))
        seen.clear()
        logits, cache = model(ids, use_cache=False).logits, DynamicMaskCache(model)
        steps = [model(piece, past_key_values=cache).logits for piece in (ids[:, :20], *ids[:, 20:].split(1, dim=1))]
        assert torch.equal(torch.cat(seen[1:], dim=2), seen[0])
        assert seen[0].unique().numel() < seen[0].numel() / 2
        torch.testing.assert_close(torch.cat(steps, dim=1), logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
def test_the_script_counts_equal_values_and_importances(monkeypatch, dtype):
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[3] / "scripts"))
    from checks import equal_tokens

    row = equal_tokens.count(equal_tokens.make_model(dtype, "cpu"), 2, 60, as_in_training=False)
    assert row["importances"] >= row["values"] >= 0.3  # a third of a prompt is processed at once
    assert (row["importances"] < 1) or row["prompts"] == "0 of 2"


@pytest.mark.parametrize("is_training", [True, False], ids=["training", "eval"])
def test_only_training_computes_an_importance_in_float32(is_training):
    gate, dtypes = first_gate(converted().to(torch.bfloat16)).train(is_training), []
    gate.dt_proj.register_forward_hook(lambda module, args, dt: dtypes.append(dt.dtype))
    importance = gate(torch.randn(1, gate.num_kv_heads, 5, gate.head_dim, dtype=torch.bfloat16))
    assert dtypes == [torch.float32 if is_training else torch.float64] and importance.dtype == torch.float32
    importance.sum().backward()
    assert gate.dt_proj.weight.grad.any()
