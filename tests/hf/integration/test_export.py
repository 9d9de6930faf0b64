"""Models leave Python by torch.export, at any length from two tokens on; other exporters are refused in a sentence."""

import importlib.util

import pytest
import torch

from ..converted import converted
from ..tiny import tokens


class Logits(torch.nn.Module):
    """A model as exporters want it: ids in, logits out. Options are those of its forward."""

    def __init__(self, model, **options):
        super().__init__()
        self.model, self.options = model, options

    def forward(self, ids):
        return self.model(input_ids=ids, **self.options).logits


def causes(error):
    """Yields the messages of an exception and of those that it follows from."""
    while error is not None:
        yield str(error)
        error = error.__cause__ or error.__context__


@pytest.mark.parametrize(
    ("strict", "options"),
    [(False, {"use_cache": False}), (True, {"use_cache": False}), (False, {})],
    ids=["non_strict", "strict", "with_a_cache_of_the_model"],
)
@torch.no_grad()
def test_an_export_of_any_length_from_two_tokens_equals_eager(strict, options):
    model = Logits(converted().eval(), **options)
    length = torch.export.Dim("length", min=2, max=4096)
    exported = torch.export.export(model, (tokens(2, 24),), dynamic_shapes=({1: length},), strict=strict).module()
    for num_tokens in (2, 3, 8, 9, 40):
        ids = tokens(2, num_tokens, seed=num_tokens)
        torch.testing.assert_close(exported(ids), model(ids))


@torch.no_grad()
def test_a_trace_is_refused_in_a_sentence():
    with pytest.raises(RuntimeError, match="cannot be recorded by torch.jit.trace.*: use torch.export.export"):
        torch.jit.trace(Logits(converted(), use_cache=False), tokens(2, 24))


@pytest.mark.skipif(importlib.util.find_spec("onnxscript") is None, reason="onnxscript is not installed")
@torch.no_grad()
def test_onnx_is_refused_in_a_sentence():
    with pytest.raises(Exception) as failure:  # noqa: PT011 - torch wraps ours in one of its own, which differs
        torch.onnx.export(Logits(converted(), use_cache=False), (tokens(2, 24),), dynamo=True)
    sentence = "flash_dmattn cannot be exported to ONNX"
    assert any(sentence in message for message in causes(failure.value))
