"""Parameters that DeepSpeed's ZeRO-3 has divided: nothing takes what is left of them for the importance."""

import sys
import warnings
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers.integrations import deepspeed as loading

from flash_dmattn_hf import convert_model, iter_gates, load_importance, save_importance, soft_selection
from flash_dmattn_hf.gates.divided import gather, is_divided, whole_shape
from flash_dmattn_hf.integration.fitting_weights import wrap_zero3_loading
from flash_dmattn_hf.training import use_chunked_loss
from flash_dmattn_hf.training.importance import _all_A

from ..tiny import tiny_model, tokens

SETTINGS = {"keep_window_size": 8, "local_window_size": 2}
_WHOLE = {}
"""Number of a divided parameter -> its values."""


def divide(parameter):
    """Leaves of a parameter what ZeRO-3 leaves on each process outside of a forward."""
    parameter.ds_id, parameter.ds_shape = len(_WHOLE), parameter.shape
    _WHOLE[parameter.ds_id] = parameter.data
    parameter.data = torch.empty(0)


@contextmanager
def gathered(parameters):
    for parameter in parameters:
        parameter.data = _WHOLE[parameter.ds_id]
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.data = torch.empty(0)


def converted(**values):
    return convert_model(tiny_model("llama"), {**SETTINGS, **values})


def divide_gates(model):
    for _, _, gate in iter_gates(model):
        for parameter in gate.parameters():
            divide(parameter)
    return model


def test_what_is_divided_is_known_by_its_shape():
    gate = next(gate for _, _, gate in iter_gates(converted()))
    before = gate.dt_proj.weight.detach().clone()
    assert not is_divided(gate.dt_proj.weight)
    divide(gate.dt_proj.weight)
    assert is_divided(gate.dt_proj.weight) and whole_shape(gate.dt_proj.weight) == tuple(before.shape)
    with gathered([gate.dt_proj.weight]):
        assert not is_divided(gate.dt_proj.weight)
        assert torch.equal(gather(gate.dt_proj.weight), before)


def test_metrics_gather_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "deepspeed", SimpleNamespace(zero=SimpleNamespace(GatheredParameters=gathered)))
    model = converted()
    for _, _, gate in iter_gates(model):
        gate.A.data.uniform_(1, 2)
    before = _all_A(model)
    assert torch.equal(_all_A(divide_gates(model)), before) and before.numel() == 4


def test_importance_is_saved_and_loaded_whole_or_not_at_all(tmp_path):
    save_importance(converted(), tmp_path / "saved")
    divided = divide_gates(converted())
    with pytest.raises(ValueError, match="A of layer 0 must be in memory as a whole to be saved"):
        save_importance(divided, tmp_path / "empty")
    with pytest.raises(ValueError, match="must be in memory to take an importance, but .*dma.A is not as a whole"):
        load_importance(divided, tmp_path / "saved")


def test_a_chunked_loss_says_that_it_needs_the_whole_output_layer():
    model = converted().train()
    model.lm_head.weight.ds_id = 0  # whole while the layer runs, as ZeRO-3 makes it
    with use_chunked_loss(model), pytest.raises(ValueError, match="needs the whole weight of the output layer"):
        model(input_ids=tokens(1, 12), labels=tokens(1, 12))


def test_a_soft_selection_does_not_watch_what_it_cannot_see():
    model = converted(add_importance_bias=False)
    for _, _, gate in iter_gates(model):
        for parameter in gate.parameters():
            divide(parameter)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with soft_selection(model, temperature=1.0):
            with gathered([p for _, _, gate in iter_gates(model) for p in gate.parameters()]):
                model(input_ids=tokens(1, 24), labels=tokens(1, 24)).loss.backward()


def test_a_soft_selection_refuses_an_engine_that_was_made_while_the_importance_was_frozen():
    class DeepSpeedEngine(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

    engine = DeepSpeedEngine(converted(add_importance_bias=False))
    with pytest.raises(ValueError, match="DeepSpeedEngine has a frozen importance"):
        with soft_selection(engine, temperature=1.0):
            pass


WRONG = {
    "a layer too many": ({"layers": (0,)}, {}, "has unused model.layers.1.self_attn.dma.A "),
    "a layer too few": ({}, {"layers": (0,)}, "has no model.layers.1.self_attn.dma.A "),
    "other heads": ({"importance_heads": "query"}, {}, "has misshapen model.layers.0.self_attn.dma.A "),
}


@pytest.mark.parametrize(("model", "checkpoint", "words"), WRONG.values(), ids=WRONG)
def test_loading_refuses_importance_that_does_not_fit(model, checkpoint, words):
    """transformers would drop such weights without a word."""
    with pytest.raises(ValueError, match=words):
        wrap_zero3_loading(lambda *_: None)(divide_gates(converted(**model)), converted(**checkpoint).state_dict())


@pytest.mark.parametrize("prefix", ["", "model."], ids=["the whole model", "the base model"])
def test_loading_takes_importance_that_fits(prefix):
    state = {name.removeprefix(prefix): value for name, value in converted().state_dict().items()}
    without = {name: value for name, value in state.items() if ".dma." not in name}
    load = wrap_zero3_loading(lambda _, state_dict: len(state_dict))
    assert load(divide_gates(converted()), state) == len(state)
    assert load(divide_gates(converted()), without) == len(without)
    assert load(tiny_model("llama"), state) == len(state)


def test_loading_is_wrapped():
    assert loading._load_state_dict_into_zero3_model.__wrapped__
