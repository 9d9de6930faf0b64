"""Layers that attend within chunks do so exactly, padded, packed and with a cache; the other layers have gates."""

import pytest
import torch

from flash_dmattn_hf import DynamicMaskCache, iter_gates

from ..converted import converted
from ..dense_definition import by_definition
from ..tiny import tokens


def test_only_full_layers_have_gates():
    assert [gate.layer_idx for _, _, gate in iter_gates(converted("llama4_text"))] == [1]


@pytest.mark.parametrize("chunks", [[30], [11, 19], [6, 1, 1, 22], [1] * 30], ids=str)
@torch.no_grad()
def test_in_any_pieces_a_cache_sees_what_one_pass_sees(chunks):
    model = converted("llama4_text")
    input_ids = torch.stack([torch.randperm(90)[:30] + 4 for _ in range(2)])
    with by_definition(model):
        expected = model(input_ids, use_cache=False).logits
    cache = DynamicMaskCache(model)
    found = torch.cat([model(ids, past_key_values=cache).logits for ids in input_ids.split(chunks, 1)], 1)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_chunks_begin_anew_in_every_packed_document():
    model, input_ids = converted("llama4_text"), tokens(2, 24)
    position_ids = torch.cat([torch.arange(9), torch.arange(15)]).expand(2, -1)
    packed = model(input_ids, position_ids=position_ids, use_cache=False).logits
    alone = [model(ids, use_cache=False).logits for ids in input_ids.split([9, 15], 1)]
    torch.testing.assert_close(packed, torch.cat(alone, 1), atol=1e-5, rtol=1e-5)


def test_padded_packed_documents_are_refused():
    input_ids, mask = tokens(1, 12), torch.ones(1, 12, dtype=torch.long)
    mask[0, :2] = 0
    position_ids = torch.tensor([[0, 0, 0, 1, 2, 3, 4, 0, 1, 2, 3, 4]])
    with pytest.raises(ValueError, match="must not be padded where attention is chunked"):
        converted("llama4_text")(input_ids, attention_mask=mask, position_ids=position_ids, use_cache=False)


def test_another_chunk_size_than_the_configured_one_is_refused():
    model = converted("llama4_text")
    model.model.layers[0].self_attn.config = type(model.config)(**{**model.config.to_dict(), "attention_chunk_size": 5})
    model.model.layers[0].self_attn.config._attn_implementation_internal = "flash_dmattn"
    with pytest.raises(ValueError, match="chunk_size of layer 0 must be 5, .* got 7"):
        model(tokens())
