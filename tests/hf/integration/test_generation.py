"""generate() with the constant-size cache gives the ids of recomputing everything, in every mode."""

import pytest
import torch
from transformers import DynamicCache, set_seed

from flash_dmattn_hf.cache.cache import DynamicMaskCache

from ..generation_models import KINDS, NEW, PROMPT, VOCAB, greedy, left_padded_prompt, make_model, make_prompt
from ..replay import ReplayedLayer, replay

MODELS = {}


def model_of(kind):
    if kind not in MODELS:
        MODELS[kind] = make_model(kind)
    return MODELS[kind]


@pytest.fixture(params=KINDS)
def model(request):
    return model_of(request.param)


@pytest.fixture(autouse=True)
def replayed(monkeypatch):
    """Every cache of these tests checks its visible sets and its size at every step."""
    replay(monkeypatch)
    yield ReplayedLayer
    assert ReplayedLayer.num_checked > NEW, "no cache of ours was used"


RECOMPUTED = {}


def without_cache(model, ids, mask, **options):
    """The ids of recomputing everything at every step, computed once per model, prompt and options."""
    key = str((id(model), ids.tolist(), mask.tolist(), options))
    if key not in RECOMPUTED:
        RECOMPUTED[key] = greedy(model, ids, mask, use_cache=False, **options)
    return RECOMPUTED[key]


def assert_same_ids(found, expected):
    assert found.tolist() == expected.tolist()


def test_greedy(model):
    ids, mask = make_prompt()
    assert_same_ids(greedy(model, ids, mask), without_cache(model, ids, mask))


def test_sampled_with_several_returns(model):
    ids, mask = make_prompt(batch=2)
    found = []
    for use_cache in (True, False):
        set_seed(5)
        found.append(
            model.generate(
                ids,
                attention_mask=mask,
                max_new_tokens=NEW,
                do_sample=True,
                top_k=0,
                num_return_sequences=3,
                use_cache=use_cache,
            )
        )
    assert_same_ids(*found)
    assert len({tuple(row) for row in found[0].tolist()}) == 6


def test_beam_search(model):
    ids, mask = make_prompt(batch=2)
    options = {"num_beams": 3, "num_return_sequences": 2}
    assert_same_ids(greedy(model, ids, mask, **options), without_cache(model, ids, mask, **options))


def test_left_padded_batch(model):
    ids, mask = left_padded_prompt()
    assert_same_ids(greedy(model, ids, mask), without_cache(model, ids, mask))


def test_left_padded_beams():
    model = model_of("llama-query-heads")
    ids, mask = left_padded_prompt()
    assert_same_ids(greedy(model, ids, mask, num_beams=2), without_cache(model, ids, mask, num_beams=2))


def test_prefill_in_chunks(model):
    ids, mask = left_padded_prompt()
    assert_same_ids(greedy(model, ids, mask, prefill_chunk_size=5), without_cache(model, ids, mask))


def test_prefill_by_hand(model):
    ids, mask = left_padded_prompt()
    past = DynamicMaskCache(model)
    position_ids = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        for start, end in ((0, 1), (1, 9), (9, PROMPT - 1)):
            model(
                ids[:, start:end],
                attention_mask=mask[:, :end],
                position_ids=position_ids[:, start:end],
                past_key_values=past,
            )
    assert past.get_seq_length() == PROMPT - 1
    assert_same_ids(greedy(model, ids, mask, past_key_values=past), without_cache(model, ids, mask))


def test_a_cache_is_reused_over_several_turns(model):
    ids, mask = left_padded_prompt()
    past = DynamicMaskCache(model)
    for turn in range(3):
        found = greedy(model, ids, mask, past_key_values=past, new=4)
        assert_same_ids(found, without_cache(model, ids, mask, new=4))
        more, _ = make_prompt(batch=3, length=(1, 14, 6)[turn], seed=turn)
        ids = torch.cat([found, more], dim=1)
        mask = torch.cat([mask, torch.ones(3, ids.shape[1] - mask.shape[1], dtype=mask.dtype)], dim=1)


@pytest.mark.parametrize("assistant", ["itself", "flash_dmattn", "dense"])
def test_assisted_decoding(model, assistant, request):
    """With itself as assistant nearly all drafts are taken, with another model nearly none."""
    ids, mask = make_prompt()
    kind = request.node.callspec.params["model"]
    if assistant == "itself":
        helper = model
    elif assistant == "flash_dmattn":
        helper = make_model(kind, seed=1)
    else:  # a sliding window would be beyond what a dense cache of transformers 5.17 can record
        helper = make_model("llama-topk", seed=1, implementation="sdpa")
    helper.generation_config.num_assistant_tokens = 6
    helper.generation_config.assistant_confidence_threshold = 0
    past = DynamicMaskCache(model)
    found = greedy(model, ids, mask, assistant_model=helper, past_key_values=past)
    assert_same_ids(found, without_cache(model, ids, mask))
    assert past.max_keys <= max(layer.windows.keep_window_size for layer in past.mask_layers)


def test_prompt_lookup(model, monkeypatch):
    """The prompt repeats itself, so that drafts are found; some are wrong and are taken back."""
    phrase, _ = make_prompt(length=7)
    ids = torch.cat([phrase, make_prompt(length=12, seed=1)[0], phrase], dim=1)
    mask = torch.ones_like(ids)
    crops = []
    original = ReplayedLayer.crop

    def crop(layer, tokens_to_remove):
        crops.append(tokens_to_remove)
        original(layer, tokens_to_remove)

    monkeypatch.setattr(ReplayedLayer, "crop", crop)
    found = greedy(model, ids, mask, prompt_lookup_num_tokens=5)
    assert_same_ids(found, without_cache(model, ids, mask))
    assert min(crops) < 0, "nothing was ever taken back"


def test_assistant_early_exit():
    """The model's own first layer drafts: two caches of one model are in use in turns."""
    model = model_of("llama-sinks-local")
    ids, mask = make_prompt()
    assert_same_ids(greedy(model, ids, mask, assistant_early_exit=1), without_cache(model, ids, mask))


def test_a_turn_with_drafts_leaves_a_cache_that_later_turns_use():
    """After assisted decoding the cache is back at its constant size and records no more."""
    model, helper = model_of("llama-topk"), make_model("llama-topk", seed=1)
    past = DynamicMaskCache(model)
    ids, mask = make_prompt()
    for options in ({"assistant_model": helper}, {}, {}):
        found = greedy(model, ids, mask, past_key_values=past, new=8, **options)
        assert_same_ids(found, without_cache(model, ids, mask, new=8))
        assert past.max_keys == 12
        assert not any(layer.record_past for layer in past.mask_layers)
        ids = torch.cat([found, make_prompt(length=3, seed=2)[0]], dim=1)
        mask = torch.ones_like(ids)
    with pytest.raises(ValueError, match="past_key_values must be empty for assisted decoding .* got a cache of"):
        greedy(model, ids, mask, past_key_values=past, prompt_lookup_num_tokens=3)


def test_a_model_with_adapters():
    """LoRA on the queries and a trainable copy of every gate: the cache asks the copy in use."""
    peft = pytest.importorskip("peft", reason="peft is an optional dependency")
    config = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["dma"], init_lora_weights=False)
    model = peft.get_peft_model(make_model("llama-sinks-local"), config).eval()
    for name, parameter in model.named_parameters():
        if "modules_to_save" in name:
            torch.nn.init.normal_(parameter)
    ids, mask = make_prompt()
    found = greedy(model, ids, mask, return_dict_in_generate=True)
    assert isinstance(found.past_key_values, DynamicMaskCache)
    assert_same_ids(found.sequences, without_cache(model, ids, mask))
    with model.disable_adapter():
        assert without_cache(model, ids, mask, new=NEW - 1).tolist() != found.sequences[:, :-1].tolist()


def test_logits_of_every_step_agree(model):
    ids, mask = left_padded_prompt()
    options = {"return_dict_in_generate": True, "output_logits": True}
    cached, full = greedy(model, ids, mask, **options), without_cache(model, ids, mask, **options)
    assert isinstance(cached.past_key_values, DynamicMaskCache)
    torch.testing.assert_close(torch.stack(cached.logits), torch.stack(full.logits), rtol=0, atol=1e-9)


def test_the_cache_stays_constant_while_the_text_grows():
    model = model_of("llama-sinks-local")
    ids, mask = make_prompt()
    sizes = []
    for new in (10, 60):
        result = greedy(model, ids, mask, new=new, return_dict_in_generate=True)
        sizes.append((result.past_key_values.nbytes, result.past_key_values.max_keys))
        assert result.past_key_values.get_seq_length() == PROMPT + new - 1
    assert sizes[0] == sizes[1] and sizes[0][1] == 16


@pytest.mark.parametrize("own", [True, False], ids=["made-by-the-model", "passed-to-generate"])
def test_a_plain_dynamic_cache_keeps_all_keys(model, own):
    """A cache without importances must hold every key, beyond a sliding window too: then it is right, if slow."""
    ids, mask = make_prompt(batch=2)
    ReplayedLayer.num_checked = NEW + 1
    expected = without_cache(model, ids, mask)
    if not own:
        past = DynamicCache(config=model.config)
        assert_same_ids(greedy(model, ids, mask, past_key_values=past), expected)
        return
    past, tokens = None, ids
    with torch.no_grad():
        while ids.shape[1] < PROMPT + NEW:
            out = model(tokens, past_key_values=past, use_cache=True)
            past, tokens = out.past_key_values, out.logits[:, -1:].argmax(-1)
            ids = torch.cat([ids, tokens], dim=1)
    assert type(past) is DynamicCache
    assert_same_ids(ids, expected)


def test_the_prompts_reach_beyond_every_window():
    """What makes the comparisons of this file mean something."""
    ReplayedLayer.num_checked = NEW + 1
    assert all(settings["keep_window_size"] < PROMPT < VOCAB for _, _, settings in KINDS.values())
