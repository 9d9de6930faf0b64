"""Masks: causal, sliding, padding and packed ones are recognised, every other one raises."""

import pytest
import torch
from transformers import DynamicCache, Gemma3Config, Gemma3ForConditionalGeneration, StaticCache, masking_utils
from transformers.masking_utils import create_bidirectional_mask, create_causal_mask, create_chunked_causal_mask
from transformers.masking_utils import create_sliding_window_causal_mask as create_sliding_mask

from flash_dmattn_hf import dynamic_mask_config, iter_gates
from flash_dmattn_hf.arguments import parameter_names
from flash_dmattn_hf.integration.mask_functions import MaskLimits
from flash_dmattn_hf.integration.masks import MaskTag, dynamic_mask_mask, tag_of

from ..converted import converted
from ..dense_definition import by_definition
from ..tiny import BASE, tiny_config, tokens


def config_of(**values):
    config = tiny_config("llama", **values)
    config._attn_implementation = "flash_dmattn"
    return config


EMBEDS = torch.zeros(2, 6, 32)


def arguments(attention_mask=None, **kwargs):
    return {"inputs_embeds": EMBEDS, "attention_mask": attention_mask, "past_key_values": None, **kwargs}


def test_the_arguments_that_the_wrapper_reads_by_their_places():
    config, embeds, mask, cache, positions, *_ = parameter_names(masking_utils._preprocess_mask_arguments)
    assert (config, embeds, mask, positions) == ("config", "inputs_embeds", "attention_mask", "position_ids")
    assert cache in ("past_key_values", "cache")


def test_plain_causal_needs_no_mask():
    assert create_causal_mask(config_of(), **arguments()) is None
    assert create_causal_mask(config_of(), **arguments(torch.ones(2, 6))) is None
    assert create_causal_mask(config_of(), **arguments(position_ids=torch.arange(6)[None])) is None


@pytest.mark.parametrize("padding", [None, torch.ones(2, 6)], ids=["none", "all_ones"])
def test_sliding_masks_carry_their_window(padding):
    mask = create_sliding_mask(config_of(sliding_window=3), **arguments(padding))
    assert mask.dtype == torch.bool and mask.shape == (2, 6) and mask.all()
    assert tag_of(mask) == MaskTag(MaskLimits(sliding_window=3), is_full=True)


@pytest.mark.parametrize("create", [create_causal_mask, create_sliding_mask], ids=["causal", "sliding"])
def test_padding_gives_a_two_dimensional_bool_mask(create):
    padding = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 0, 1, 1]])
    mask = create(config_of(sliding_window=3), **arguments(padding))
    assert mask.dtype == torch.bool and torch.equal(mask, padding.bool())
    assert tag_of(mask) == MaskTag(MaskLimits(3 if create is create_sliding_mask else None), is_full=False)


def test_packed_positions_give_document_numbers():
    positions = torch.tensor([[0, 1, 2, 0, 1, 2], [0, 1, 2, 3, 4, 0]])
    mask = create_causal_mask(config_of(), **arguments(position_ids=positions))
    assert mask.tolist() == [[0, 0, 0, 1, 1, 1], [0, 0, 0, 0, 0, 1]]


def _everything(batch, head, q, k):
    return q >= 0


_BLOCKS = torch.tensor([[0, 0, 1, 1, 1, -1]] * 2)
FOREIGN = {
    "or_mask": lambda: create_causal_mask(config_of(), **arguments(or_mask_function=_everything)),
    "and_mask": lambda: create_causal_mask(config_of(), **arguments(and_mask_function=_everything)),
    "sliding_or_mask": lambda: create_sliding_mask(
        config_of(sliding_window=3), **arguments(or_mask_function=_everything)
    ),
    "blocks_alone": lambda: create_causal_mask(
        config_of(), **arguments(and_mask_function=masking_utils.blockwise_overlay(_BLOCKS))
    ),
    "blocks_and_another": lambda: create_causal_mask(
        config_of(), **arguments(or_mask_function=_everything, block_sequence_ids=_BLOCKS)
    ),
    "blocks_of_two_kinds": lambda: create_causal_mask(
        config_of(),
        **arguments(or_mask_function=masking_utils.blockwise_overlay(_BLOCKS), block_sequence_ids=_BLOCKS),
    ),
    "hidden_blocks": lambda: create_causal_mask(
        config_of(),
        **arguments(
            or_mask_function=masking_utils.blockwise_overlay(_BLOCKS),
            and_mask_function=masking_utils.causal_mask_function,
        ),
    ),
    "chunked_blocks": lambda: create_chunked_causal_mask(
        config_of(attention_chunk_size=4), **arguments(or_mask_function=masking_utils.blockwise_overlay(_BLOCKS))
    ),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_foreign_masks_raise(case):
    with pytest.raises(ValueError, match="causal, sliding-window, chunked, padding and packed masks only"):
        FOREIGN[case]()


def test_a_bidirectional_mask_is_a_row_that_self_attention_refuses():
    padding = torch.tensor([[1, 1, 1, 1, 0, 0], [1] * 6])
    for given, expected in ((None, [[True] * 6]), (padding, padding.bool().tolist())):
        mask = create_bidirectional_mask(config_of(), EMBEDS, given)
        assert mask.shape[1:] == (1, 1, 6)
        assert mask[:, 0, 0].tolist() == expected
    model = converted()
    model.config.is_causal = False
    with pytest.raises(ValueError, match="asks for bidirectional attention"):
        model(torch.tensor([[4, 5, 6]]), use_cache=False)


def test_a_mask_that_was_made_already_stays_as_it_is():
    positions = torch.tensor([[0, 1, 2, 0, 1, 2], [0, 1, 2, 3, 4, 0]])
    mask = create_causal_mask(config_of(), **arguments(position_ids=positions))
    again = create_causal_mask(config_of(), **arguments(attention_mask=mask, position_ids=positions))
    assert again.tolist() == mask.tolist()


def test_a_chunked_mask_says_how_long_its_chunks_are():
    mask = create_chunked_causal_mask(config_of(attention_chunk_size=4), **arguments())
    assert tag_of(mask) == MaskTag(MaskLimits(chunk_size=4), is_full=True)


def test_recognition_does_not_trust_the_flags():
    two = masking_utils.and_masks(masking_utils.causal_mask_function, _everything)
    chunked = masking_utils.chunked_causal_mask_function(3, torch.zeros(2, dtype=torch.long))
    two_kinds = masking_utils.and_masks(chunked, masking_utils.sliding_window_overlay(3))
    sliding, blocks = masking_utils.sliding_window_overlay(3), masking_utils.blockwise_overlay(_BLOCKS)
    hidden = masking_utils.and_masks(masking_utils.or_masks(sliding, blocks), masking_utils.causal_mask_function)
    for function in (two, two_kinds, _everything, sliding, blocks, hidden):
        with pytest.raises(ValueError, match="packed masks only"):
            dynamic_mask_mask(2, 6, 6, mask_function=function, local_size=3, use_vmap=False)
    other = masking_utils.sliding_window_causal_mask_function(4)
    assert tag_of(dynamic_mask_mask(2, 6, 6, mask_function=other, local_size=3)).limits == MaskLimits(4)


def test_a_refused_mask_is_named_by_its_parts():
    causal, window = masking_utils.causal_mask_function, masking_utils.sliding_window_overlay(3)
    function = masking_utils.or_masks(masking_utils.and_masks(window, causal), _everything)
    with pytest.raises(ValueError, match=r"\(\(sliding_window_overlay and causal_mask_function\) or _everything\)$"):
        dynamic_mask_mask(2, 6, 6, mask_function=function)


NO_BLOCKS = torch.full((2, 6), -1)
WITHOUT_IMAGES = {
    "causal": (None, dict(block_sequence_ids=NO_BLOCKS)),
    "sliding": (3, dict(block_sequence_ids=NO_BLOCKS)),
    "sliding_inside": (
        3,
        dict(
            or_mask_function=masking_utils.blockwise_overlay(NO_BLOCKS),
            and_mask_function=masking_utils.sliding_window_overlay(3),
        ),
    ),
    "two_windows": (2, dict(and_mask_function=masking_utils.sliding_window_overlay(2))),
}


@pytest.mark.parametrize("case", WITHOUT_IMAGES)
def test_blocks_of_images_that_are_not_there_change_nothing(case):
    window, overlays = WITHOUT_IMAGES[case]
    create = create_sliding_mask if case in ("sliding", "two_windows") else create_causal_mask
    mask = create(config_of(sliding_window=3), **arguments(**overlays))
    assert (None if mask is None else tag_of(mask).limits.sliding_window) == window


def make_gemma3():
    text = {**BASE, "head_dim": 8, "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes = {"mm_tokens_per_image": 4, "image_token_index": 98, "boi_token_index": 97, "eoi_token_index": 96}
    config = Gemma3Config(text_config=text, vision_config={**vision, "image_size": 16, "patch_size": 8}, **sizes)
    with dynamic_mask_config(keep_window_size=10):
        return Gemma3ForConditionalGeneration._from_config(config, attn_implementation="flash_dmattn")


def test_token_types_of_text_are_those_of_no_token_types():
    """A processor always returns token_type_ids; without an image all of them are 0."""
    model, ids = make_gemma3(), tokens()
    types = torch.zeros_like(ids)
    for mode in (model.train(), model.eval()):
        expected, out = mode(ids, labels=ids), mode(ids, labels=ids, token_type_ids=types)
        assert torch.equal(out.logits, expected.logits) and torch.equal(out.loss, expected.loss)
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    assert torch.equal(model.generate(ids, token_type_ids=types, **options), model.generate(ids, **options))


@pytest.mark.parametrize("dtype", [torch.bool, torch.float64])
def test_four_dimensional_masks_raise(dtype):
    mask = torch.ones(2, 1, 24, 24).tril().to(dtype)
    with pytest.raises(ValueError, match=r"attention_mask must have shape \(B, S\).* in LlamaAttention"):
        converted()(tokens(), attention_mask=mask)


def test_three_dimensional_masks_raise():
    with pytest.raises(ValueError, match=r"attention_mask must have shape \(B, S\).*custom masks are not supported"):
        converted()(tokens(), attention_mask=torch.ones(2, 1, 24, dtype=torch.long))


def test_masks_of_the_wrong_length_raise():
    with pytest.raises(ValueError, match="attention_mask"):
        converted()(tokens(), attention_mask=torch.ones(2, 20, dtype=torch.long), use_cache=False)


def test_a_static_cache_raises():
    model = converted()
    with pytest.raises(ValueError, match="static cache"):
        model(tokens(), past_key_values=StaticCache(config=model.config, max_cache_len=64))


PADDINGS = {
    "left": [(0, 0, 5)],
    "right": [(0, 19, 24)],
    "interior": [(0, 8, 13), (1, 3, 4)],
    "all_kinds": [(0, 0, 3), (0, 10, 12), (1, 20, 24), (1, 7, 15)],
}


@pytest.mark.parametrize("kind", PADDINGS)
def test_padding_equals_the_definition(kind):
    model = converted()
    mask = torch.ones(2, 24, dtype=torch.long)
    for row, start, stop in PADDINGS[kind]:
        mask[row, start:stop] = 0
    with torch.no_grad():
        ours = model(tokens(), attention_mask=mask, use_cache=False).logits
        with by_definition(model):
            expected = model(tokens(), attention_mask=mask, use_cache=False).logits
    torch.testing.assert_close(ours[mask.bool()], expected[mask.bool()], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("model_type", ["llama", "gemma2"])
@pytest.mark.parametrize("kind", PADDINGS)
def test_padding_takes_no_place_in_any_window(kind, model_type):
    model, input_ids = converted(model_type), tokens()
    mask = torch.ones(2, 24, dtype=torch.long)
    for row, start, stop in PADDINGS[kind]:
        mask[row, start:stop] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        padded = model(input_ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
        for row in range(2):
            real = mask[row].bool()
            alone = model(input_ids[row, real][None], use_cache=False).logits[0]
            torch.testing.assert_close(padded[row, real], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", PADDINGS)
def test_what_stands_in_padding_changes_nothing(kind):
    model, input_ids = converted(), tokens()
    mask = torch.ones(2, 24, dtype=torch.long)
    for row, start, stop in PADDINGS[kind]:
        mask[row, start:stop] = 0
    with torch.no_grad():
        first = model(input_ids, attention_mask=mask).logits
        second = model(torch.where(mask.bool(), input_ids, 7), attention_mask=mask).logits
    assert torch.equal(first[mask.bool()], second[mask.bool()])


@pytest.mark.parametrize("steps", [[24], [12, 12], [9, 1, 1, 13]], ids=str)
def test_a_plain_dynamic_cache_that_holds_all_keys_is_right(steps):
    model, cache, start = converted(), DynamicCache(), 0
    with torch.no_grad():
        expected = model(tokens(), use_cache=False).logits
        for step in steps:
            logits = model(tokens()[:, start : start + step], past_key_values=cache).logits
            torch.testing.assert_close(logits, expected[:, start : start + step], atol=1e-9, rtol=1e-9)
            start += step


def test_a_cache_that_dropped_competing_keys_raises():
    model = converted("mistral")
    cache = DynamicCache(config=tiny_config("mistral"))
    assert cache.is_sliding == [True, True]
    with torch.no_grad():
        model(tokens(), past_key_values=cache)
        with pytest.raises(ValueError, match="dropped 15 keys.*DynamicMaskCache"):
            model(tokens(2, 1), past_key_values=cache)


def test_native_sliding_layers_may_drop_their_keys():
    model = converted("gemma2", keep_window_size=16)
    assert [gate.sliding_window for _, _, gate in iter_gates(model)] == [None]
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        expected = model(tokens(), use_cache=False).logits
        for start in range(0, 24, 6):
            logits = model(tokens()[:, start : start + 6], past_key_values=cache).logits
            torch.testing.assert_close(logits, expected[:, start : start + 6], atol=1e-9, rtol=1e-9)
