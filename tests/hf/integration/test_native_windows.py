"""Layers that keep their own window or chunks see what the model's own masks say, wherever padding stands."""

from itertools import accumulate, pairwise

import pytest
import torch

from flash_dmattn_hf import DynamicMaskCache
from flash_dmattn_hf.integration import native_windows

from ..cache.test_static_hybrids import KINDS, make_model
from ..dense_definition import by_definition

LENGTH = 40
WINDOWS = [kind for kind in ("gemma2", "gemma3_text", "gpt_oss", "llama4_text") if kind in KINDS]


def text():
    """Tokens, none twice in a row, and their mask, with padding before, between and after them."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.stack([torch.randperm(90, generator=generator)[:LENGTH] + 4 for _ in range(3)])
    mask = torch.ones_like(ids)
    mask[0, 8:13] = mask[0, 20:22] = mask[1, :5] = mask[1, 17:24] = mask[2, 30:] = 0
    return ids, mask


def of_real_tokens(logits, mask):
    return logits[mask.bool()]


@pytest.fixture(scope="module", params=WINDOWS)
def model(request):
    return make_model(request.param)


@pytest.fixture(scope="module")
def expected(model):
    ids, mask = text()
    with torch.no_grad(), by_definition(model):
        return of_real_tokens(model(ids, attention_mask=mask, use_cache=False).logits, mask)


@torch.no_grad()
def test_one_pass(model, expected):
    ids, mask = text()
    found = of_real_tokens(model(ids, attention_mask=mask, use_cache=False).logits, mask)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_every_call_says_that_its_rows_follow_each_other(model, monkeypatch):
    """Where they do not, a GPU makes room for all keys in every list, and the CUDA library is not deterministic."""
    calls, attend = [], native_windows.attend
    monkeypatch.setattr(native_windows, "attend", lambda call, backend: calls.append(call) or attend(call, backend))
    ids, mask = text()
    model(ids, attention_mask=mask, use_cache=False)
    assert len(calls) == 1 and calls[0].is_ordered


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@pytest.mark.parametrize("pieces", [[1] * LENGTH, [11, 1, 1, 1, 1, 25], [23, 17], [9, 2, 29]], ids=str)
@torch.no_grad()
def test_in_pieces(model, expected, pieces, static):
    ids, mask = text()
    positions, cache, found = torch.arange(LENGTH).expand(3, -1), DynamicMaskCache(model, static=static), []
    for start, end in pairwise([0, *accumulate(pieces)]):
        piece = {"attention_mask": mask[:, :end], "position_ids": positions[:, start:end]}
        found.append(model(ids[:, start:end], **piece, past_key_values=cache).logits)
    torch.testing.assert_close(of_real_tokens(torch.cat(found, 1), mask), expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_static_cache_goes_on_from_a_dynamic_one(model, expected):
    ids, mask = text()
    positions, dynamic = torch.arange(LENGTH).expand(3, -1), DynamicMaskCache(model)
    start = {"attention_mask": mask[:, :27], "position_ids": positions[:, :27]}
    found = [model(ids[:, :27], **start, past_key_values=dynamic).logits]
    static = DynamicMaskCache(model, static=True)
    static.load_state_dict(dynamic.state_dict())
    for row in range(27, LENGTH):
        step = {"attention_mask": mask[:, : row + 1], "position_ids": positions[:, row : row + 1]}
        found.append(model(ids[:, row : row + 1], **step, past_key_values=static).logits)
    torch.testing.assert_close(of_real_tokens(torch.cat(found, 1), mask), expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_packed_documents_with_padding_between_their_tokens():
    model, (ids, mask) = make_model("gemma3_text"), text()
    lengths = [25, LENGTH - 25]
    positions = torch.cat([torch.arange(length) for length in lengths]).expand(3, -1)
    packed = model(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
    with by_definition(model):
        parts = zip(ids.split(lengths, 1), mask.split(lengths, 1), strict=True)
        alone = [model(own, attention_mask=real, use_cache=False).logits for own, real in parts]
    expected = of_real_tokens(torch.cat(alone, 1), mask)
    torch.testing.assert_close(of_real_tokens(packed, mask), expected, atol=1e-5, rtol=1e-5)
