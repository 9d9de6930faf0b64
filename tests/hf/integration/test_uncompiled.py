"""A model's own code runs inside `uncompiled`, and only what is compiled is switched off for it."""

from contextlib import ExitStack

import pytest
import torch
from torch import nn

from flash_dmattn_hf.integration.uncompiled import eagerly, uncompiled


def compiled_whole(model):
    return torch.compile(model, backend="eager")


def compiled_in_place(model):
    model.compile(backend="eager")
    return model


def compiled_in_part(model):
    model[0].compile(backend="eager")
    return model


class Layer(nn.Linear):
    """Counts how often its Python code runs uncompiled."""

    def forward(self, x):
        if not torch.compiler.is_compiling():
            self.calls = getattr(self, "calls", 0) + 1
        return super().forward(x)


def calls_of(model, layer):
    before = getattr(layer, "calls", 0)
    model(torch.ones(1, 2))
    return getattr(layer, "calls", 0) - before


@pytest.mark.parametrize("compile_it", [compiled_whole, compiled_in_place, compiled_in_part])
def test_the_code_of_a_compiled_model_runs(compile_it):
    layer = Layer(2, 2)
    model = compile_it(nn.Sequential(layer))
    assert calls_of(model, layer) == 0
    with uncompiled(model):
        assert calls_of(model, layer) == 1
    assert calls_of(model, layer) == 0


def test_what_others_have_compiled_goes_on_beside_a_model_that_is_not():
    layer = Layer(2, 2)
    other = compiled_whole(nn.Sequential(layer))
    with uncompiled(nn.Linear(2, 2)):
        assert calls_of(other, layer) == 0


def test_blocks_that_overlap_end_with_the_last():
    layer = Layer(2, 2)
    model = compiled_whole(nn.Sequential(layer))
    first, second = ExitStack(), ExitStack()
    first.enter_context(eagerly)
    second.enter_context(eagerly)
    first.close()
    assert calls_of(model, layer) == 1
    second.close()
    assert calls_of(model, layer) == 0
