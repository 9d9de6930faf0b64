"""Images and prefixes whose tokens see each other: Gemma 3, Gemma 4, PaliGemma, against masks of transformers' own."""

import inspect

import pytest
import torch
from transformers import (
    DynamicCache,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma4Config,
    Gemma4ForConditionalGeneration,
    GenerationMixin,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
)
from transformers.masking_utils import create_causal_mask
from transformers.masking_utils import create_sliding_window_causal_mask as create_sliding_mask

from flash_dmattn import find_blocks
from flash_dmattn_hf import DynamicMaskCache, dynamic_mask_config, iter_gates, soft_selection
from flash_dmattn_hf.integration.blocks import mark_blocks, read_blocks
from flash_dmattn_hf.integration.mask_functions import MaskLimits
from flash_dmattn_hf.integration.masks import MaskTag, tag_of

from ..dense_definition import by_definition
from ..tiny import BASE, FAMILIES, build, tiny_config, tokens

CLOSE = {"atol": 1e-6, "rtol": 1e-5}
"""The norms of these models work in float32."""
IMAGE = 98
"""The token that stands for a piece of an image; an image has four."""
WINDOWS = {"keep_window_size": 9, "num_sink_tokens": 2, "local_window_size": 5}
"""A prefix of PaliGemma is longer than an image."""
LONG_WINDOWS = {"keep_window_size": 16, "num_sink_tokens": 1, "local_window_size": 12}

_VISION = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
_SLIDING = {"layer_types": ["sliding_attention", "full_attention"]}


def _gemma3(sliding_window):
    text = {**BASE, **_SLIDING, "head_dim": 8, "sliding_window": sliding_window}
    names = {"mm_tokens_per_image": 4, "image_token_index": IMAGE, "boi_token_index": 97, "eoi_token_index": 96}
    return Gemma3ForConditionalGeneration, Gemma3Config(text_config=text, vision_config=_VISION, **names)


def _paligemma(model_type, **text):
    text = {**BASE, "head_dim": 8, "model_type": model_type, **text}
    vision = {**_VISION, "model_type": "siglip_vision_model", "vision_use_head": False}
    config = PaliGemmaConfig(text_config=text, vision_config=vision, image_token_index=IMAGE, projection_dim=32)
    return PaliGemmaForConditionalGeneration, config


MODELS = {
    "gemma3": (lambda: _gemma3(8), WINDOWS),
    "gemma3-long-sliding-window": (lambda: _gemma3(12), WINDOWS),
    "paligemma": (lambda: _paligemma("gemma"), LONG_WINDOWS),
    "paligemma2": (lambda: _paligemma("gemma2", sliding_window=14, **_SLIDING), LONG_WINDOWS),
}


def make(name, **windows):
    """A random float64 model, its importance far from zero."""
    make_config, defaults = MODELS[name]
    torch.manual_seed(0)
    cls, config = make_config()
    with dynamic_mask_config(**{**defaults, **windows}):
        model = cls._from_config(config, attn_implementation="flash_dmattn").double().eval()
    with torch.no_grad():
        for _, _, gate in iter_gates(model):
            gate.A.normal_()
            gate.dt_proj.weight.normal_()
    return model


def inputs(name, padded=False):
    """Two texts: with two images and three for Gemma 3, with one image in a prefix for PaliGemma."""
    ids = tokens(2, 30)
    if name.startswith("gemma3"):
        for row, start in ((0, 1), (0, 14), (1, 6), (1, 11), (1, 22)):
            ids[row, start : start + 4] = IMAGE
        types = (ids == IMAGE).long()
    else:
        ids[:, :4] = IMAGE
        types = torch.ones_like(ids)
        types[0, :7], types[1, :9] = 0, 0
    mask = torch.ones_like(ids)
    if padded:
        ids, types, mask = (torch.cat([x.new_zeros(2, 3), x], dim=1) for x in (ids, types, mask))
        mask[0, :3] = 0
        ids[1, :3] = tokens(1, 3)
        mask[1, :3] = 1
        if name.startswith("paligemma"):  # its prefix is one block: no text before it
            types[1, :3] = 0
    num_images = int((ids == IMAGE).sum()) // 4
    pixels = torch.randn(num_images, 3, 16, 16, generator=torch.Generator().manual_seed(1)).double()
    return {"input_ids": ids, "token_type_ids": types, "attention_mask": mask, "pixel_values": pixels}


def later(batch, start, end=None):
    """The inputs of some of the tokens of a text, when those before are cached."""
    past = slice(None, end)
    return {
        "input_ids": batch["input_ids"][:, start:end],
        "attention_mask": batch["attention_mask"][:, past],
        "token_type_ids": batch["token_type_ids"][:, past],
    }


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("name", MODELS)
def test_a_model_equals_the_definition(name, padded):
    model, batch = make(name), inputs(name, padded)
    real = batch["attention_mask"].bool()
    with torch.no_grad():
        logits = model(**batch, use_cache=False).logits
        with by_definition(model):
            expected = model(**batch, use_cache=False).logits
        types = batch["token_type_ids"].clone()
        types[0, first_block(name, batch)] = 0 if name.startswith("gemma3") else 1
        without = model(**{**batch, "token_type_ids": types}, use_cache=False).logits
    torch.testing.assert_close(logits[real], expected[real], **CLOSE)
    assert (logits - without).abs().max() > 1e-3  # blocks matter


def first_block(name, batch):
    """Where the first block of the first text stands."""
    types = batch["token_type_ids"][0]
    is_block = types == 1 if name.startswith("gemma3") else (types == 0) & batch["attention_mask"][0].bool()
    return is_block.nonzero()[:4, 0]


@pytest.mark.parametrize("name", MODELS)
def test_up_to_the_window_it_is_eager_attention(name):
    model, batch = make(name, keep_window_size=64, num_sink_tokens=2, local_window_size=40), inputs(name)
    with torch.no_grad():
        for _, _, gate in iter_gates(model):
            gate.A.zero_()
        logits = model(**batch, use_cache=False).logits
        model.set_attn_implementation("eager")
        expected = model(**batch, use_cache=False).logits
    torch.testing.assert_close(logits, expected, **CLOSE)


@pytest.mark.parametrize("name", MODELS)
def test_gradients_equal_those_of_the_definition(name):
    model, batch = make(name).train(), inputs(name)
    batch["labels"] = batch["input_ids"]
    found = []
    for context in (None, by_definition(model)):
        model.zero_grad()
        if context is None:
            model(**batch, use_cache=False).loss.backward()
        else:
            with context:
                model(**batch, use_cache=False).loss.backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert any(n.endswith("dma.A") for n in found[0])
    torch.testing.assert_close(*found, **CLOSE)


def make_cache(kind, model):
    return DynamicCache() if kind == "plain" else DynamicMaskCache(model, static=kind == "static")


@pytest.mark.parametrize("kind", ["ours", "static", "plain"])
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("name", MODELS)
def test_a_cache_changes_nothing(name, padded, kind):
    model, batch = make(name), inputs(name, padded)
    first = batch["input_ids"].shape[1] - 4
    cache = make_cache(kind, model)
    with torch.no_grad():
        expected = model(**batch, use_cache=False).logits
        start = {k: x if k == "pixel_values" else x[:, :first] for k, x in batch.items()}
        got = [model(**start, past_key_values=cache).logits]
        for step in range(first, batch["input_ids"].shape[1]):
            part = later(batch, step, step + 1)
            got.append(
                model(input_ids=part["input_ids"], attention_mask=part["attention_mask"], past_key_values=cache).logits
            )
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(torch.cat(got, dim=1)[real], expected[real], **CLOSE)
    if kind != "plain":
        assert cache.max_keys <= max(WINDOWS["keep_window_size"], LONG_WINDOWS["keep_window_size"])


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}, {"num_beams": 3}], ids=str)
def test_generating_with_images(name, options):
    model, batch = make(name), inputs(name)
    if "cache_implementation" in options and name == "paligemma2":
        with pytest.raises(ValueError, match="does not take the masks of its sliding and full layers"):
            model.generate(**batch, **options)
        return
    settings = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    settings["suppress_tokens"] = [IMAGE]
    generated = model.generate(**batch, **settings, **options)
    expected = model.generate(**batch, **settings, num_beams=options.get("num_beams", 1), use_cache=False)
    assert torch.equal(generated, expected)


def test_masks_say_where_blocks_begin():
    config = tiny_config("llama", sliding_window=4)
    config._attn_implementation = "flash_dmattn"
    numbers = torch.tensor([[-1, 3, 3, 3, -1, 5], [0, 0, 0, 0, 1, 1]])
    padding = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 0, 1, 1, 1]])
    arguments = {"inputs_embeds": torch.zeros(2, 6, 32), "past_key_values": None, "block_sequence_ids": numbers}
    mask = create_causal_mask(config, attention_mask=None, **arguments)
    assert mask.tolist() == [[[0, 1, 1, 1, 4, 5]], [[0, 0, 0, 0, 4, 4]]] and mask.dtype == torch.int32
    assert tag_of(mask) == MaskTag(MaskLimits(), is_full=True, block_size=4)
    sliding = create_sliding_mask(config, attention_mask=padding, **arguments)
    assert sliding.tolist() == [[[0, 1, 1, 1, 4, 5]], [[0, 0, ~2, 0, 4, 4]]]
    assert tag_of(sliding) == MaskTag(MaskLimits(4), is_full=False, block_size=3)
    for tagged in (True, False):  # as when a model moves its mask
        real, blocks = read_blocks(sliding, 3 if tagged else None)
        assert torch.equal(real, padding.bool()) and blocks.size == 3
        assert torch.equal(blocks.start, find_blocks(numbers, padding_mask=padding.bool()).start)


def test_a_mask_that_lost_its_tag_says_the_same(monkeypatch):
    model, batch = make("paligemma"), inputs("paligemma", padded=True)
    with torch.no_grad():
        expected = model(**batch, use_cache=False).logits
        monkeypatch.setattr("flash_dmattn_hf.integration.attention.tag_of", lambda mask: None)
        torch.testing.assert_close(model(**batch, use_cache=False).logits, expected)


def test_a_compiled_model_that_breaks_its_graph_gets_the_same_mask():
    config = tiny_config("llama")
    config._attn_implementation = "flash_dmattn"
    arguments = {"inputs_embeds": torch.zeros(1, 6, 32), "attention_mask": None, "past_key_values": None}
    arguments["block_sequence_ids"] = torch.tensor([[-1, 0, 0, 0, -1, 1]])
    compiled = torch.compile(create_causal_mask, backend="eager")
    assert compiled(config, **arguments).tolist() == create_causal_mask(config, **arguments).tolist()


def test_images_of_a_later_turn():
    model, batch, first = make("gemma3-long-sliding-window"), inputs("gemma3"), 12
    batch = {name: x[:1] for name, x in batch.items()}
    batch["pixel_values"] = torch.cat([batch["pixel_values"]] * 2) * torch.tensor([1, 2]).view(2, 1, 1, 1)
    cache = DynamicMaskCache(model)
    with torch.no_grad():
        expected = model(**batch, use_cache=False).logits
        turns = {name: x[:, :first] for name, x in batch.items() if name != "pixel_values"}
        got = [model(**turns, pixel_values=batch["pixel_values"][:1], past_key_values=cache).logits]
        turns = later(batch, first)
        got.append(model(**turns, pixel_values=batch["pixel_values"][1:], past_key_values=cache).logits)
    torch.testing.assert_close(torch.cat(got, dim=1), expected, **CLOSE)


@pytest.mark.parametrize("chunk", [6, 14, 16])
def test_prefill_in_chunks_that_split_no_image(chunk):
    """Chunks that split one are refused."""
    model, batch = make("gemma3-long-sliding-window"), inputs("gemma3")
    batch = {name: x[:1] for name, x in batch.items()}
    batch["pixel_values"] = torch.cat([batch["pixel_values"]] * 2)
    settings = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "suppress_tokens": [IMAGE]}
    if "token_types" not in inspect.getsource(GenerationMixin._prefill):
        pytest.skip("this transformers drops the token types")
    if chunk == 16:  # the second image stands at 14 .. 17
        with pytest.raises(ValueError, match="must come in one forward.*leave out prefill_chunk_size"):
            model.generate(**batch, **settings, prefill_chunk_size=chunk)
        return
    expected = model.generate(**batch, **settings)
    assert torch.equal(model.generate(**batch, **settings, prefill_chunk_size=chunk), expected)


def refuse(sentence, *arguments):
    with pytest.raises(ValueError, match=sentence):
        mark_blocks(*arguments)


def test_blocks_that_come_in_parts_are_refused():
    numbers = torch.tensor([[-1, 0, 0, 0, -1, -1, 1, 1]])
    for num_cached, length in ((0, 1), (1, 6), (4, 8), (6, 8)):
        mark_blocks(numbers, None, num_cached, length)
    for num_cached, length in ((2, 8), (3, 6), (7, 8)):
        refuse("a bidirectional block.*of which the first tokens are cached", numbers, None, num_cached, length)
    for num_cached, length in ((0, 2), (1, 3), (4, 7)):
        refuse("a bidirectional block.*of which the last tokens come later", numbers, None, num_cached, length)
    padding = torch.tensor([[True, True, True, False]])
    refuse("the last tokens come later", torch.tensor([[0, 0, 0, 7, 0]]), padding, 0, 4)
    assert mark_blocks(numbers, None, 4, 6) is None


def test_blocks_with_other_tokens_in_between_are_refused():
    sentence = "must follow one another, got a block with other tokens in between"
    refuse(sentence, torch.tensor([[0, 0, 1, 0]]), None, 0, 4)
    refuse(sentence, torch.tensor([[-1, 5, -1, 5]]), None, 0, 4)
    gap = torch.tensor([[True, True, False, True]])
    assert mark_blocks(torch.tensor([[0, 0, -1, 0]]), gap, 0, 4)[0].tolist() == [[[0, 0, ~2, 0]]]
    assert mark_blocks(torch.tensor([[0, -1, 0, 0]]), None, 1, 4)[1] == 2  # the other part was seen before


def test_an_image_longer_than_the_local_window_is_refused_and_leaves_the_cache_usable():
    model, batch = make("gemma3-long-sliding-window", local_window_size=3), inputs("gemma3")
    cache = DynamicMaskCache(model)
    for options in ({"use_cache": False}, {"past_key_values": cache}):
        with pytest.raises(ValueError, match="local_window_size must hold the longest .* block, which has 4 tokens"):
            model(**batch, **options)
    cache.reset()
    short = {k: x[:, :9] if k != "pixel_values" else x[[0, 2]] for k, x in batch.items()}
    short["token_type_ids"], short["input_ids"] = short["token_type_ids"].clone(), short["input_ids"].clone()
    short["input_ids"][1] = short["input_ids"][0]
    short["token_type_ids"][1] = short["token_type_ids"][0]
    with torch.no_grad():  # all nine tokens fit into the window
        expected = model(**short, use_cache=False).logits
        torch.testing.assert_close(model(**short, past_key_values=cache).logits, expected, **CLOSE)


def test_an_image_longer_than_the_sliding_window_is_refused():
    with pytest.raises(ValueError, match="sliding_window must hold the longest bidirectional block"):
        MODELS["narrow"] = (lambda: _gemma3(3), WINDOWS)
        try:
            make("narrow")(**inputs("gemma3"), use_cache=False)
        finally:
            del MODELS["narrow"]


def test_images_in_packed_documents_are_refused():
    model, batch = make("gemma3"), inputs("gemma3")
    del batch["attention_mask"]
    positions = torch.arange(30).remainder(13)[None].expand(2, -1)
    with pytest.raises(ValueError, match="blocks, such as images, are not supported in packed documents"):
        model(**batch, position_ids=positions, use_cache=False)


def test_images_in_documents_that_only_the_attention_is_told_of_are_refused():
    batch = {name: tensor[:1] for name, tensor in inputs("gemma3").items() if name != "pixel_values"}
    bounds = torch.tensor([0, 30], dtype=torch.int32)
    with pytest.raises(ValueError, match="blocks, such as images, are not supported in packed documents"):
        make("gemma3")(**batch, cu_seq_lens_q=bounds, cu_seq_lens_k=bounds, use_cache=False)


def test_a_text_that_may_be_bidirectional_must_say_where():
    model, batch = make("paligemma"), inputs("paligemma")
    for types in (None, torch.ones_like(batch["input_ids"])):
        with pytest.raises(ValueError, match="calls itself bidirectional.*token_type_ids"):
            model(**{**batch, "token_type_ids": types}, use_cache=False)
    with dynamic_mask_config(keep_window_size=8):
        config = tiny_config("gemma", use_bidirectional_attention=True)
        gemma = build(config, attn_implementation="flash_dmattn")
    with pytest.raises(ValueError, match="calls itself bidirectional"):
        gemma(tokens())


def test_a_soft_cut_trains_on_images():
    model, batch = make("gemma3").train(), inputs("gemma3")
    with soft_selection(model, temperature=0.5):
        model(**batch, labels=batch["input_ids"], use_cache=False).loss.backward()
    for _, _, gate in iter_gates(model):
        assert gate.dt_proj.weight.grad.abs().sum() > 0


def test_layers_that_share_keys_see_images():
    """Gemma 4, whose last layers take the keys of earlier ones, also with a cache."""
    text = {**BASE, **FAMILIES["gemma4_text"], "sliding_window": 12, "use_bidirectional_attention": "vision"}
    torch.manual_seed(0)
    with dynamic_mask_config(**WINDOWS):
        config = Gemma4Config(text_config=text, vision_config=None, audio_config=None)
        model = Gemma4ForConditionalGeneration._from_config(config, attn_implementation="flash_dmattn").double().eval()
    with torch.no_grad():
        for _, _, gate in iter_gates(model):
            gate.A.normal_()
            gate.dt_proj.weight.normal_()
        ids, types, cache = tokens(2, 30), torch.zeros(2, 30, dtype=torch.long), DynamicMaskCache(model)
        types[0, 3:8], types[0, 15:18], types[1, 20:25] = 1, 1, 1
        logits = model(input_ids=ids, mm_token_type_ids=types, use_cache=False).logits
        with by_definition(model):
            expected = model(input_ids=ids, mm_token_type_ids=types, use_cache=False).logits
        got = [model(input_ids=ids[:, :28], mm_token_type_ids=types[:, :28], past_key_values=cache).logits]
        got += [model(input_ids=ids[:, step : step + 1], past_key_values=cache).logits for step in (28, 29)]
    torch.testing.assert_close(logits, expected, **CLOSE)
    torch.testing.assert_close(torch.cat(got, dim=1), logits, **CLOSE)
