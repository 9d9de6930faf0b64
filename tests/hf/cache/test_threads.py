"""Many threads run one model at once, each with its own cache: every result is that of a single thread."""

import concurrent.futures
import functools
import sys
import threading

import pytest
import torch

from flash_dmattn_hf import DynamicMaskCache
from flash_dmattn_hf.arguments import pop_cache
from flash_dmattn_hf.cache.handover import hand_over
from flash_dmattn_hf.gates.importance import get_gate

from ..generation_models import greedy, left_padded_prompt, make_model, make_prompt

NUM_THREADS = 8


def cached_chunks(model, number):
    """Pieces of many lengths and single tokens; all logits."""
    ids, past = make_prompt(batch=1 + number % 2, length=34, seed=number)[0], DynamicMaskCache(model)
    pieces = ids.split([1 + number, 19, 1, 1, 12 - number], dim=1)
    return torch.cat([model(piece, past_key_values=past).logits for piece in pieces], dim=1)


def uncached(model, number):
    return model(make_prompt(length=20 + number, seed=number)[0], use_cache=False).logits


def generated(model, number):
    ids, mask = left_padded_prompt()
    return greedy(model, ids.roll(number, 0), mask.roll(number, 0), new=3)


def generated_static(model, number):
    ids, mask = make_prompt(length=10, seed=number)
    return greedy(model, ids, mask, new=4, cache_implementation="static")


def generated_with_drafts(model, number):
    ids, mask = make_prompt(length=9, seed=number)
    return greedy(model, ids, mask, new=4, prompt_lookup_num_tokens=3)


WORK = [cached_chunks, uncached, generated, generated_static, generated_with_drafts]


@pytest.fixture
def eager_switching():
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


def run_in_threads(work):
    """Calls work(number) in threads that start together; returns the results by number, or raises what one raised."""
    barrier = threading.Barrier(NUM_THREADS)

    def run(number):
        barrier.wait()
        with torch.no_grad():
            return work(number)

    with concurrent.futures.ThreadPoolExecutor(NUM_THREADS) as pool:
        return list(pool.map(run, range(NUM_THREADS)))


@pytest.mark.parametrize("kind", ["llama-sinks-local", "llama-query-heads", "qwen2-sliding-below-w", "doge"])
def test_eight_threads_find_what_one_finds(kind, eager_switching):
    model = make_model(kind)
    work = [task for task in WORK if task is not generated_static or kind != "qwen2-sliding-below-w"]
    with torch.no_grad():
        expected = [[task(model, number) for task in work] for number in range(NUM_THREADS)]

    def all_tasks(number):
        order = [(number + shift) % len(work) for shift in range(len(work))]
        return {index: work[index](model, number) for index in order * 2}

    for found, wanted in zip(run_in_threads(all_tasks), expected, strict=True):
        for index, task in enumerate(work):
            assert torch.equal(found[index], wanted[index]), task.__name__


def test_the_first_forward_may_come_from_many_threads(eager_switching):
    """It is checked whether every gate was called, and the check is taken out of the model."""
    for seed in range(5):
        model = make_model("llama-topk", seed=seed)
        found = run_in_threads(functools.partial(uncached, model))
        assert all(torch.equal(logits, uncached(model, number)) for number, logits in enumerate(found))
        assert not model._forward_hooks and not model.model._forward_hooks


@pytest.fixture
def model():
    return make_model("llama-sinks-local", num_hidden_layers=1)


def attention_module(model):
    return model.model.layers[0].self_attn


def intercept_attention(model, monkeypatch, run):
    """Has run(attention, *args, **kwargs) called instead of the attention function."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    original = ALL_ATTENTION_FUNCTIONS["flash_dmattn"]
    monkeypatch.setitem(
        type(ALL_ATTENTION_FUNCTIONS)._global_mapping,
        "flash_dmattn",
        lambda *args, **kwargs: run(original, *args, **kwargs),
    )


@torch.no_grad()
def test_another_thread_takes_nothing(model):
    gate = get_gate(attention_module(model))
    key = value = torch.zeros(1, 2, 3, 8, dtype=torch.float64)
    layer = DynamicMaskCache(model).layers[0]
    layer.update(key, value)
    assert run_in_threads(lambda _: hand_over.take(gate, key, value)) == [None] * NUM_THREADS
    assert hand_over.take(gate, key, value) is layer
    assert hand_over.take(gate, key, value) is None


@torch.no_grad()
def test_a_lost_hand_over_is_an_error(model, monkeypatch):
    """One token must not attend to itself alone because its cache was not found."""
    ids, _ = make_prompt(length=20)
    past = DynamicMaskCache(model)
    model(ids[:, :19], past_key_values=past)

    def attend_elsewhere(attention, *args, **kwargs):
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            return pool.submit(attention, *args, **kwargs).result()

    with monkeypatch.context() as patch:
        intercept_attention(model, patch, attend_elsewhere)
        with pytest.raises(RuntimeError, match="layer 0 must attend to 19 cached tokens as well, but their cache"):
            model(ids[:, 19:], past_key_values=past)
    expected = model(ids, use_cache=False).logits
    assert torch.equal(model(ids, use_cache=False).logits, expected), "what was left is not taken"


@torch.no_grad()
def test_a_cache_that_a_layer_does_not_use_is_an_error(model, monkeypatch):
    ids, _ = make_prompt(length=20)
    past = DynamicMaskCache(model)
    model(ids[:, :19], past_key_values=past)
    forward = type(attention_module(model)).forward

    def without_cache(*args, **kwargs):
        pop_cache(kwargs)
        return forward(attention_module(model), *args, **kwargs)

    monkeypatch.setattr(attention_module(model), "forward", without_cache)
    for mask in (None, torch.ones_like(ids)):
        with pytest.raises(RuntimeError, match="layer 0 must attend to 19 cached tokens as well"):
            model(ids[:, 19:], attention_mask=mask, past_key_values=past)


@pytest.mark.parametrize("state", [0, 1], ids=["key", "value"])
@torch.no_grad()
def test_tensors_that_change_on_the_way_are_an_error(model, monkeypatch, state):
    ids, _ = make_prompt(length=20)

    def copy_one(attention, module, query, *states, **kwargs):
        states = list(states)
        states[state] = states[state].clone()
        return attention(module, query, *states, **kwargs)

    for start in (0, 19):
        past = DynamicMaskCache(model)
        if start:
            model(ids[:, :start], past_key_values=past)
        with monkeypatch.context() as patch:
            intercept_attention(model, patch, copy_one)
            with pytest.raises(RuntimeError, match=f"layer 0 changed its {['key', 'value'][state]} between the cache"):
                model(ids[:, start:], past_key_values=past)


@torch.no_grad()
def test_the_cache_of_another_model_is_an_error_at_once(model):
    """Also where no second layer would notice."""
    other = make_model("llama-sinks-local", num_hidden_layers=1, seed=1)
    with pytest.raises(RuntimeError, match="tokens for layer 0 of a DynamicMaskCache reached another attention module"):
        other(make_prompt()[0], past_key_values=DynamicMaskCache(model))


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("kind", ["llama-sinks-local", "llama-query-heads", "doge"])
@torch.no_grad()
def test_an_interrupted_forward_leaves_nothing_to_the_next(kind, monkeypatch):
    model = make_model(kind)
    ids, _ = make_prompt(length=20)
    expected = model(ids, use_cache=False).logits

    def interrupt(attention, *args, **kwargs):
        raise Interrupted

    def break_off():
        past = DynamicMaskCache(model)
        model(ids[:, :10], past_key_values=past)
        with monkeypatch.context() as patch:
            intercept_attention(model, patch, interrupt)
            with pytest.raises(Interrupted):
                model(ids[:, 10:], past_key_values=past)
        return past

    break_off()
    assert torch.equal(model(ids, use_cache=False).logits, expected)
    break_off()
    found = model(ids, past_key_values=DynamicMaskCache(model)).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
    past = break_off()
    with pytest.raises(RuntimeError, match="last 10 tokens .* never attended to"):
        model(ids[:, 10:], past_key_values=past)
    past.reset()
    torch.testing.assert_close(model(ids, past_key_values=past).logits, expected, rtol=0, atol=1e-9)


@torch.no_grad()
def test_a_compiled_forward_hands_over_across_a_break(model, monkeypatch):
    """The attention function may run outside of the graph that updates the cache."""
    torch.compiler.reset()
    ids, _ = make_prompt(length=20)
    expected = model(ids, use_cache=False).logits
    intercept_attention(model, monkeypatch, torch.compiler.disable(lambda attention, *a, **k: attention(*a, **k)))
    compiled, past = torch.compile(model, backend="eager"), DynamicMaskCache(model)
    model(ids[:, :19], past_key_values=past)
    found = compiled(ids[:, 19:], past_key_values=past).logits
    torch.testing.assert_close(found, expected[:, 19:], rtol=0, atol=1e-9)
