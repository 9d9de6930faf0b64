"""Gates before soft training: the ranking stays, dt lies where softplus is straight, and the inputs are measured."""

import pytest
import torch

from flash_dmattn_hf import iter_gates
from flash_dmattn_hf.gates.soft_selection import soft_selection
from flash_dmattn_hf.integration.observed_attention import observed_attention
from flash_dmattn_hf.training.gate_preparation import LEVEL, check_gates, prepare_gates

from ..tiny import tiny_model
from .distillation_setup import make_model, text

STRETCHES = text(640, seed=5).view(4, 160)


def values_of(model, input_ids):
    """The values (S, Hkv * D) that every layer sees under the hard mask, in the model's order."""
    seen = []

    def attend(module, query, key, value, softmax_scale, softcap):
        seen.append(value[0].transpose(0, 1).flatten(1))
        return torch.nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=softmax_scale, enable_gqa=True
        )

    with torch.no_grad(), observed_attention({module for _, module, _ in iter_gates(model)}, attend):
        model(input_ids[None], use_cache=False)
    return seen


@torch.no_grad()
def logits(model):
    return model(STRETCHES, use_cache=False).logits


def test_predictions_stay_as_they_are():
    model = make_model()
    before = logits(model)
    prepare_gates(model, STRETCHES)
    torch.testing.assert_close(logits(model), before, atol=1e-4, rtol=1e-4)


def test_inputs_are_those_of_the_tokens_after_the_sinks():
    model = make_model(keep_window_size=256)  # nothing is evicted: the values are the dense ones
    layers = prepare_gates(model, STRETCHES)
    values = [values_of(model, stretch) for stretch in STRETCHES]
    for number, layer in enumerate(layers):
        inputs = torch.cat([of_stretch[number][2:] for of_stretch in values]).double()
        torch.testing.assert_close(layer.mean, inputs.mean(0), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(layer.std, inputs.std(0, correction=0), atol=1e-5, rtol=1e-4)
        dt = inputs.float() @ layer.layer.weight.T + layer.layer.bias
        torch.testing.assert_close(dt.mean(0), torch.full((2,), LEVEL), atol=1e-3, rtol=0)


def test_a_scales_nothing_but_keeps_its_sign():
    model = make_model(calibrated=False)
    gates = [gate for _, _, gate in iter_gates(model)]
    with torch.no_grad():
        gates[0].A.copy_(torch.tensor([-3e-4, 0.0]))
    prepare_gates(model, STRETCHES)
    assert gates[0].A.tolist() == [-1.0, 1.0] and gates[1].A.tolist() == [1.0, 1.0]


def test_a_stays_where_it_is_added_to_the_logits():
    model = make_model(add_importance_bias=True)
    before = [gate.A.detach().clone() for _, _, gate in iter_gates(model)]
    prepare_gates(model, STRETCHES)
    assert all(torch.equal(gate.A, A) for (_, _, gate), A in zip(iter_gates(model), before, strict=True))


def test_without_a_bias_the_weights_stay_and_inputs_are_measured():
    model = make_model(dt_proj_bias=False)
    before = [gate.dt_proj.weight.detach().clone() for _, _, gate in iter_gates(model)]
    layers = prepare_gates(model, STRETCHES)
    for layer, weight in zip(layers, before, strict=True):
        assert layer.layer.bias is None and torch.equal(layer.layer.weight, weight) and (layer.std > 0).all()


def test_soft_selection_is_the_same_whatever_the_size_of_a():
    """What makes a trained A needless."""
    model = make_model()
    prepare_gates(model, STRETCHES)
    with soft_selection(model, temperature=0.5), torch.no_grad():
        expected = model(STRETCHES, use_cache=False).logits
        for _, _, gate in iter_gates(model):
            gate.A *= 0.01
        torch.testing.assert_close(model(STRETCHES, use_cache=False).logits, expected, atol=1e-4, rtol=1e-3)


def test_models_that_cannot_be_distilled_are_refused():
    with pytest.raises(ValueError, match="must be one that convert_model has given dynamic masks"):
        check_gates(tiny_model("llama"))
    with pytest.raises(ValueError, match="A of model.layers.0.self_attn must not be 0"):
        check_gates(make_model(calibrated=False, add_importance_bias=True))
    check_gates(make_model(calibrated=False))
