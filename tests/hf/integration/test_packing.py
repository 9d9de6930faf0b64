"""Packed batches: documents in one row never see each other, whatever tells where they begin."""

import pytest
import torch
from transformers import DataCollatorWithFlattening

from flash_dmattn_hf import DynamicMaskCache
from flash_dmattn_hf.integration import attention

from ..converted import converted
from ..tiny import tokens

LENGTHS = (13, 1, 20, 9)
FAMILIES = ["llama", "gemma2", "gpt2", "gpt_neox"]


def documents():
    return [tokens(1, length, seed=length)[0] for length in LENGTHS]


def packed(*, flash_kwargs=False, position_ids=True):
    features = [{"input_ids": document.tolist()} for document in documents()]
    collator = DataCollatorWithFlattening(
        return_position_ids=position_ids, return_flash_attn_kwargs=flash_kwargs, return_tensors="pt"
    )
    batch = collator(features)
    batch.pop("labels")
    return batch


def alone(model):
    with torch.no_grad():
        return torch.cat([model(document[None], use_cache=False).logits[0] for document in documents()])


@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("use_cache", [None, False], ids=["default_cache", "no_cache"])
def test_restarting_positions(model_type, training, use_cache):
    model = converted(model_type)
    expected = alone(model)
    model.train(training)
    with torch.no_grad():
        logits = model(**packed(), use_cache=use_cache).logits[0]
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_cu_seqlens_of_the_flattening_collator(training):
    model = converted()
    expected = alone(model)
    batch = packed(flash_kwargs=True)
    assert "cu_seq_lens_q" in batch
    with torch.no_grad():
        logits = model.train(training)(**batch).logits[0]
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)


def test_all_ones_attention_mask_does_not_hide_the_documents():
    model, batch = converted(), packed()
    with torch.no_grad():
        logits = model(**batch, attention_mask=torch.ones_like(batch["input_ids"])).logits[0]
    torch.testing.assert_close(logits, alone(model), atol=1e-5, rtol=1e-5)


def test_several_rows_with_different_documents():
    model, input_ids = converted(), tokens(2, 24)
    positions = torch.cat([torch.arange(10), torch.arange(14)]).repeat(2, 1)
    positions[1] = torch.cat([torch.arange(17), torch.arange(7)])
    with torch.no_grad():
        logits = model(input_ids, position_ids=positions).logits
        for row, cut in ((0, 10), (1, 17)):
            pieces = [model(input_ids[row : row + 1, part]).logits[0] for part in (slice(cut), slice(cut, None))]
            torch.testing.assert_close(logits[row], torch.cat(pieces), atol=1e-5, rtol=1e-5)


def test_no_gradient_crosses_documents():
    model, batch = converted(), packed()
    embeds = model.get_input_embeddings()(batch.pop("input_ids")).detach().requires_grad_()
    logits = model(inputs_embeds=embeds, **batch, use_cache=False).logits[0]
    logits[LENGTHS[0] + LENGTHS[1] :].square().sum().backward()
    assert embeds.grad[0, : LENGTHS[0] + LENGTHS[1]].eq(0).all()
    assert embeds.grad[0, LENGTHS[0] + LENGTHS[1] :].abs().sum(-1).min() > 0


def test_no_square_tensor(monkeypatch):
    seen = []
    original = attention.dynamic_mask_attention_forward

    def watch(module, query, key, value, attention_mask, **kwargs):
        seen.append(attention_mask)
        return original(module, query, key, value, attention_mask, **kwargs)

    from transformers import AttentionInterface

    monkeypatch.setitem(AttentionInterface._global_mapping, "flash_dmattn", watch)
    with torch.no_grad():
        converted()(**packed(), use_cache=False)
    assert [tuple(mask.shape) for mask in seen] == [(1, sum(LENGTHS))] * 2


def test_documents_and_a_constant_size_cache_are_refused():
    model = converted()
    for batch in (packed(), packed(flash_kwargs=True)):
        with pytest.raises(ValueError, match="packed sequences cannot be combined"):
            model(**batch, past_key_values=DynamicMaskCache(model))


def test_restarting_positions_after_cached_tokens_are_refused():
    model = converted()
    with torch.no_grad():
        cache = model(tokens(1, 5), use_cache=True).past_key_values
    with pytest.raises(ValueError, match="use_cache=False"):
        model(tokens(1, 4), position_ids=torch.tensor([[5, 6, 0, 1]]), past_key_values=cache)


def test_cu_seqlens_need_one_row():
    model = converted()
    bounds = torch.tensor([0, 10, 24], dtype=torch.int32)
    with pytest.raises(ValueError, match="one packed row"):
        model(tokens(2, 24), cu_seq_lens_q=bounds, cu_seq_lens_k=bounds, max_length_q=14, max_length_k=14)


def test_cu_seqlens_of_queries_and_keys_must_agree():
    model = converted()
    bounds, other = torch.tensor([0, 10, 24], dtype=torch.int32), torch.tensor([0, 9, 24], dtype=torch.int32)
    with pytest.raises(ValueError, match="cu_seq_lens_k"):
        model(tokens(1, 24), cu_seq_lens_q=bounds, cu_seq_lens_k=other, max_length_q=14, max_length_k=15)


@pytest.mark.parametrize("model_type", ["opt", "biogpt"])
def test_models_that_hide_positions_from_their_attention_refuse_documents(model_type):
    model = converted(model_type)
    with pytest.raises(ValueError, match="does not tell its attention where packed documents begin"):
        model(**packed())
    with torch.no_grad():
        model(tokens(), position_ids=torch.arange(24).expand(2, -1))
