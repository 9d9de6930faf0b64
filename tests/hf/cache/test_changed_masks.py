"""A mask that changes over cached tokens is obeyed exactly, or refused in a sentence; it is never ignored."""

import pytest
import torch
from transformers import DynamicCache

from flash_dmattn_hf import DynamicMaskCache

from ..generation_models import greedy, left_padded_prompt, make_model, make_prompt

LENGTH, NEW = 26, 6


@pytest.fixture(scope="module")
def model():
    return make_model("llama-sinks-local")


def masks(changes):
    """A mask of the cached tokens, and one of all tokens that changes these of its columns."""
    before = torch.ones(2, LENGTH, dtype=torch.long)
    before[0, :5] = before[1, 8:11] = 0
    after = torch.cat([before, torch.ones(2, NEW, dtype=torch.long)], dim=1)
    for row, column in changes:
        after[row, column] = 1 - after[row, column]
    return before, after


CHANGES = {
    "hide_one": [(0, 12)],
    "hide_the_last": [(1, LENGTH - 1)],
    "show_one": [(0, 4)],
    "show_all": [*((0, column) for column in range(5)), *((1, column) for column in range(8, 11))],
    "hide_one_and_show_another": [(1, 8), (1, 20)],
    "move_padding_to_another_row": [(0, 0), (1, 0)],
}


def continued(model, cache, before, after, **options):
    ids, _ = make_prompt(batch=2, length=LENGTH + NEW)
    positions = torch.arange(LENGTH + NEW).expand(2, -1)
    with torch.no_grad():
        model(ids[:, :LENGTH], attention_mask=before, position_ids=positions[:, :LENGTH], past_key_values=cache)
        options |= {"position_ids": positions[:, LENGTH:], "past_key_values": cache}
        return model(ids[:, LENGTH:], attention_mask=after, **options).logits


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@pytest.mark.parametrize("case", CHANGES)
def test_a_cache_that_dropped_keys_refuses_other_masks(model, case, static):
    with pytest.raises(ValueError, match=f"attention_mask must mark the {LENGTH} cached tokens as when they came"):
        continued(model, DynamicMaskCache(model, static=static), *masks(CHANGES[case]))


@pytest.mark.parametrize("case", [*CHANGES, None])
def test_a_cache_of_all_keys_obeys_other_masks(model, case):
    before, after = masks(CHANGES.get(case, []))
    ids, _ = make_prompt(batch=2, length=LENGTH + NEW)
    positions = torch.arange(LENGTH + NEW).expand(2, -1)
    with torch.no_grad():
        # What a first layer has cached does not depend on the mask.
        one = make_model("llama-sinks-local", num_hidden_layers=1)
        whole = one(ids, attention_mask=after, position_ids=positions, use_cache=False).logits[:, LENGTH:]
    torch.testing.assert_close(continued(one, DynamicCache(), before, after), whole, atol=1e-9, rtol=1e-9)


def test_no_mask_shows_what_was_hidden(model):
    with pytest.raises(ValueError, match="attention_mask must mark the 26 cached tokens"):
        continued(model, DynamicMaskCache(model), masks([])[0], None)
    ones = torch.ones(2, LENGTH, dtype=torch.long)
    assert continued(model, DynamicMaskCache(model), ones, None).isfinite().all()


@pytest.mark.parametrize("case", ["reorder", "repeat", "select", "reset", "state", "crop", "move"])
def test_padding_goes_with_the_rows_of_the_cache(model, case):
    ids, mask = left_padded_prompt()
    ids, mask = ids[:, :14], mask[:, :14]
    mask[2] = torch.arange(14) >= 7
    cache = DynamicMaskCache(model)
    with torch.no_grad():
        model(ids, attention_mask=mask, past_key_values=cache)
        order = torch.tensor([2, 0, 1])
        if case == "reorder":
            cache.reorder_cache(order)
            mask = mask[order]
        elif case == "repeat":
            cache.batch_repeat_interleave(2)
            mask, ids = mask.repeat_interleave(2, 0), ids.repeat_interleave(2, 0)
        elif case == "select":
            cache.batch_select_indices(order[:2])
            mask, ids = mask[order[:2]], ids[:2]
        elif case == "reset":
            cache.reset()
            mask = mask[:, :0]
        elif case == "state":
            state, cache = cache.state_dict(), DynamicMaskCache(model)
            cache.load_state_dict(state)
        elif case == "crop":
            cache.crop(-3)
            mask = mask[:, :-3]
        else:
            cache.to("cpu")
        for new in (torch.ones_like(mask[:, :1]) if mask.shape[1] else torch.ones(3, 1, dtype=torch.long),) * 2:
            mask = torch.cat([mask, new], dim=1)
            model(ids[:, :1], attention_mask=mask, past_key_values=cache)
        mask = mask.clone()
        mask[0, 1] = 1 - mask[0, 1]
        with pytest.raises(ValueError, match="attention_mask must mark"):
            model(ids[:, :1], attention_mask=torch.cat([mask, mask[:, -1:]], dim=1), past_key_values=cache)


def test_what_is_remembered_of_left_padding_does_not_grow(model):
    cache, (ids, mask) = DynamicMaskCache(model), left_padded_prompt()
    greedy(model, ids, mask, new=20, past_key_values=cache)
    assert cache.padding.mask.shape == (3, 17)


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
def test_a_mask_of_another_length_is_refused_as_such(model, static):
    cache, (ids, _) = DynamicMaskCache(model, static=static), make_prompt(length=LENGTH)
    with torch.no_grad():
        model(ids, past_key_values=cache)
        for length in (3, LENGTH, LENGTH + 2):
            with pytest.raises(ValueError, match=f"attention_mask must have {LENGTH + 1} columns"):
                model(ids[:, :1], attention_mask=torch.ones(1, length), past_key_values=cache)
