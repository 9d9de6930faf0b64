"""Packed batches: documents in one row never see each other, whatever tells where they begin."""

import pytest
import torch
from transformers import DataCollatorWithFlattening, DynamicCache

from flash_dmattn_hf import DynamicMaskCache
from flash_dmattn_hf.integration import attention

from ..converted import converted
from ..dense_definition import by_definition
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


@torch.no_grad()
def test_a_cache_of_packed_documents_is_not_continued():
    """Later tokens would see all documents, each of which has seen itself alone."""
    model, cache = converted().eval(), DynamicCache()
    model(**packed(), past_key_values=cache)
    with pytest.raises(ValueError, match=f"must hold one document in each row, got the {sum(LENGTHS)} cached tokens"):
        model(tokens(1, 1), past_key_values=cache)
    cache = DynamicCache()
    model(tokens(1, 5), past_key_values=cache)
    assert model(tokens(1, 1), past_key_values=cache).logits.isfinite().all()


PADDINGS = {
    "behind": lambda mask: mask.index_fill_(1, torch.tensor([40, 41, 42]), 0),
    "before": lambda mask: mask.index_fill_(1, torch.tensor([0, 1, 2]), 0),
    "at_a_start": lambda mask: mask.index_fill_(1, torch.tensor([34, 35]), 0),
    "inside": lambda mask: mask.index_fill_(1, torch.tensor([5, 6, 20]), 0),
    "a_whole_document": lambda mask: mask.index_fill_(1, torch.tensor([13]), 0),
}


@pytest.mark.parametrize("use_cache", [None, False], ids=["default_cache", "no_cache"])
@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize("case", PADDINGS)
def test_documents_and_padding_are_both_obeyed(case, model_type, use_cache):
    """Row 1 has no padding. Padded tokens have whatever position: here 0 throughout, as generate() gives them."""
    model, batch = converted(model_type), packed()
    ids, mask = batch["input_ids"].repeat(2, 1), torch.ones(2, sum(LENGTHS), dtype=torch.long)
    PADDINGS[case](mask[:1])
    positions = batch["position_ids"].repeat(2, 1).masked_fill(mask == 0, 0)
    with torch.no_grad():
        logits = model(ids, attention_mask=mask, position_ids=positions, use_cache=use_cache).logits
        start = 0
        for length in LENGTHS:
            part, start = slice(start, start + length), start + length
            real = mask[0, part].bool()
            piece = {"input_ids": ids[:1, part][:, real], "position_ids": positions[:1, part][:, real]}
            if real.any():
                expected = model(**piece, use_cache=False).logits[0]
                torch.testing.assert_close(logits[0, part][real], expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits[1], alone(model), atol=1e-5, rtol=1e-5)


def test_documents_with_a_mask_are_refused_while_compiling():
    torch.compiler.reset()
    model = torch.compile(converted().train(), fullgraph=True, backend="aot_eager")
    batch, mask = packed(), torch.ones(1, sum(LENGTHS), dtype=torch.long)
    with pytest.raises(RuntimeError, match="packed position_ids with an attention_mask cannot be compiled"):
        model(**batch, attention_mask=mask, use_cache=False)
    model(batch["input_ids"], attention_mask=mask, use_cache=False)


NO_DOCUMENTS = {
    "gap": torch.cat([torch.arange(12), torch.arange(50, 62)]),
    "several_gaps": torch.arange(24) + torch.arange(24) // 5 * 3,
    "groups": torch.arange(24) // 4,
    "groups_then_neighbours": torch.cat([torch.arange(12) // 3, torch.arange(4, 16)]),
    "stride": torch.arange(24) * 3,
    "offset": torch.arange(24) + 100,
    "constant": torch.full((24,), 7),
    "zero": torch.zeros(24, dtype=torch.long),
    "clamped": torch.arange(24).clamp(max=15),
}


@pytest.mark.parametrize("mask", [None, "ones", "padded"])
@pytest.mark.parametrize("case", NO_DOCUMENTS)
def test_positions_that_do_not_fall_back_are_only_positions(case, mask):
    model, positions = converted(), NO_DOCUMENTS[case].expand(2, -1)
    padding = None if mask is None else torch.ones(2, 24, dtype=torch.long)
    if mask == "padded":
        padding[0, :5] = padding[1, 9:12] = 0
    inputs = {"input_ids": tokens(), "attention_mask": padding, "position_ids": positions}
    real = torch.ones(2, 24, dtype=torch.bool) if padding is None else padding.bool()
    with torch.no_grad():
        for cache in ({"use_cache": False}, {}, {"past_key_values": DynamicMaskCache(model)}):
            logits = model(**inputs, **cache).logits[real]
            with by_definition(model):
                expected = model(**inputs).logits[real]  # the definition looks for no packing here
            torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("ours", [True, False], ids=["constant_size", "growing"])
def test_positions_after_cached_tokens_are_only_positions(ours):
    """Whatever they do: nobody who goes on with a cache starts a document."""
    model, ids = converted(), tokens(1, 30)
    positions = torch.cat([torch.arange(20), torch.tensor([5, 6, 7, 0, 1, 2, 30, 30, 9, 4])])[None]
    with torch.no_grad():
        with by_definition(model):
            expected = model(ids, position_ids=positions).logits[:, 20:]  # the definition looks for no packing here
        cache = DynamicMaskCache(model) if ours else DynamicCache()
        model(ids[:, :20], position_ids=positions[:, :20], past_key_values=cache)
        logits = model(ids[:, 20:], position_ids=positions[:, 20:], past_key_values=cache).logits
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)


def test_generation_goes_on_from_positions_with_a_gap():
    model, positions = converted(), NO_DOCUMENTS["gap"].expand(2, -1)
    options = {"attention_mask": torch.ones(2, 24, dtype=torch.long), "max_new_tokens": 4, "do_sample": False}
    options |= {"eos_token_id": None, "pad_token_id": 0, "position_ids": positions}
    cached = model.generate(tokens(), **options)
    assert torch.equal(cached, model.generate(tokens(), **options, use_cache=False))


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
