"""Recall over a cache that another method compresses: what is kept is what is seen, and no slot too many."""

from contextlib import contextmanager, nullcontext

import pytest
import torch

from flash_dmattn_hf.arguments import get_cache
from flash_dmattn_hf.evaluation import recall_prompts
from flash_dmattn_hf.evaluation.compressed_cache import measure_compressed, score_compressed
from flash_dmattn_hf.evaluation.scoring import answer_positions, score_teacher_forced

from ..tiny import tiny_model
from .recall_text import CHARACTERS, TOKENS

SINKS = 3


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama", initializer_range=0.3, eos_token_id=None, max_position_embeddings=1024).eval()


@pytest.fixture(scope="module")
def prompts():
    return recall_prompts(CHARACTERS, TOKENS, tasks=["pass_key"], contexts=[300], depths=[20, 80], samples=1)


@contextmanager
def sinks_and_newest(model, num_keys, num_kept):
    """Keeps the first `SINKS` keys and the newest ones of every layer, as a press does: in hooks."""
    kept = torch.cat([torch.arange(SINKS), torch.arange(num_keys - num_kept + SINKS, num_keys)])

    def compress(module, arguments, options, output):
        layer = get_cache(options).layers[module.layer_idx]
        assert torch.equal(options["cache_position"], torch.arange(num_keys))
        layer.keys, layer.values = layer.keys[:, :, kept], layer.values[:, :, kept]

    hooks = [layer.self_attn.register_forward_hook(compress, with_kwargs=True) for layer in model.model.layers]
    yield
    for hook in hooks:
        hook.remove()


@torch.no_grad()
def with_answers_of_the_kept_keys(model, prompt, window, split):
    """Returns the prompt with the answers that the model gives when rows from `split` on see only what is kept."""
    length, num_kept = prompt.context, window - (prompt.context - split)
    row, key = torch.arange(length)[:, None], torch.arange(length)
    is_evicted = (row >= split) & (key >= SINKS) & (key < split - num_kept + SINKS)
    mask = torch.zeros(1, 1, length, length).masked_fill((key > row) | is_evicted, torch.finfo(torch.float32).min)
    ids = prompt.input_ids.clone()
    for position in answer_positions(prompt).tolist():
        logits = model(input_ids=ids[None], attention_mask=mask, use_cache=False).logits[0]
        ids[position] = logits[position - 1].argmax()
    return prompt._replace(input_ids=ids)


@pytest.mark.parametrize("sees_question", [False, True])
def test_question_and_answers_see_what_was_kept(model, prompts, sees_question):
    prompt = prompts[0]
    window = prompt.context - prompt.question_start + 24
    split = prompt.answer_start - 1 if sees_question else prompt.question_start
    prompt = with_answers_of_the_kept_keys(model, prompt, window, split)
    options = {"compression": sinks_and_newest, "keep_window_size": window, "sees_question": sees_question}
    assert score_compressed(model, prompt, **options).all_right
    assert not score_teacher_forced(model, prompt).all_right


def test_a_cache_that_keeps_all_scores_as_one_forward(model, prompts):
    compression = {"compression": lambda *_: nullcontext(), "keep_window_size": prompts[0].context}
    for prompt in prompts:
        answered = prompt.input_ids.clone()
        with torch.no_grad():
            first = answer_positions(prompt)[0]
            answered[first] = model(input_ids=answered[None]).logits[0, first - 1].argmax()
        prompt = prompt._replace(input_ids=answered)
        score = score_compressed(model, prompt, **compression)
        assert score == score_teacher_forced(model, prompt)
        assert score.tokens > 0


def test_the_question_starts_where_it_says(prompts):
    for prompt in prompts:
        assert CHARACTERS.decode(prompt.input_ids[prompt.question_start :]).startswith("\n# Question: what is")


def test_a_row_has_the_names_of_the_others(model, prompts):
    row = measure_compressed("peer", model, prompts, compression=sinks_and_newest, keep_window_size=128)
    assert row["kind"] == "peer" and row["loss"] is None and row["keep_window_size"] == 128
    assert [(cell["task"], cell["depth"]) for cell in row["recall"]] == [("pass_key", 20), ("pass_key", 80)]


def test_bad_input_is_refused(model, prompts):
    with pytest.raises(ValueError, match="keep_window_size must be above"):
        score_compressed(model, prompts[0], compression=sinks_and_newest, keep_window_size=8)
    with pytest.raises(ValueError, match="compression must leave"):
        score_compressed(model, prompts[0], compression=lambda *_: nullcontext(), keep_window_size=128)
