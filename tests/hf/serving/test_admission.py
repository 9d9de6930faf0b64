"""Memory is known in advance: what fits is counted before the first request, and what started never has to stop."""

import pytest
import torch

from flash_dmattn_hf import DynamicMaskConfig
from flash_dmattn_hf.serving.rows import Rows
from tests.hf.converted import converted
from tests.hf.cross_attention_models import bart, mllama
from tests.hf.generation_models import make_model
from tests.hf.integration.test_blocks import make as make_with_blocks
from tests.hf.serving.engine import Engine, alone, batching, greedy_config, needs_serving
from tests.hf.serving.test_generate_batch import make_prompts

pytestmark = needs_serving


def test_rows():
    rows = Rows(4)
    assert rows.admit("a", 3) and not rows.admit("b", 2) and rows.num_available == 1
    own, child = rows.hand_over("a", "child")
    assert rows.held == {"a": [own, rows.held["a"][1]], "child": [child]} and own != child
    assert rows.keep_snapshot("prefix") is not None and rows.keep_snapshot("other") is None
    assert rows.num_available == 1 and rows.admit("b", 1) and not rows.snapshots
    for name in ("a", "b", "child", "unknown"):
        rows.release(name)
    assert rows.num_available == 4
    first, second = rows.keep_snapshot("first"), rows.keep_snapshot("second")
    assert rows.use_snapshot("first") == first  # so the second is given up before it
    assert rows.admit("c", 3) and second in rows.held["c"] and list(rows.snapshots) == ["first"]


def test_what_is_counted_is_what_is_allocated():
    from flash_dmattn_hf.serving.layers import served_layers
    from flash_dmattn_hf.serving.memory import bytes_per_request

    for kind in ("llama-query-heads", "llama-shares", "qwen2-sliding-below-w", "deepseek-v3"):
        model = make_model(kind)
        engine = Engine(model, num_blocks=3)
        allocated = sum(state.nbytes for slots in engine.cache.live_requests.slots.values() for state in slots)
        assert allocated == 3 * bytes_per_request(served_layers(model), model.dtype)


def test_how_many_fit():
    from flash_dmattn_hf.serving.memory import count_rows

    sizes = {"row_bytes": 10, "workspace": 20, "share": 0.5, "available": 100}
    assert count_rows(**sizes, num_rows=None, most=99) == 3
    assert count_rows(**sizes, num_rows=None, most=2) == 2
    assert count_rows(**sizes, num_rows=3, most=2) == 3
    with pytest.raises(ValueError, match="4 request.* must fit into 50% .* got room for 3: lower max_batch_tokens"):
        count_rows(**sizes, num_rows=4, most=9)
    with pytest.raises(ValueError, match="1 request.* got room for 0"):
        count_rows(**{**sizes, "available": 50}, num_rows=None, most=9)


def test_copies_of_shared_keys_count():
    """n rows fit if n * row + min(n, 4) * copy + workspace do."""
    from flash_dmattn_hf.serving.memory import count_rows

    for copied_bytes, available in ((0, 100), (3, 100), (3, 136), (7, 137), (7, 138), (40, 140), (40, 400)):
        fitting = [n for n in range(99) if 10 * n + min(n, 4) * copied_bytes + 20 <= available]
        sizes = {"share": 1.0, "most": 99, "copied_bytes": copied_bytes, "most_copied": 4, "available": available}
        assert count_rows(10, 20, num_rows=None, **sizes) == fitting[-1]
        assert count_rows(10, 20, num_rows=fitting[-1], **sizes) == fitting[-1]
        with pytest.raises(ValueError, match=f"got room for {fitting[-1]}"):
            count_rows(10, 20, num_rows=fitting[-1] + 1, **sizes)


@pytest.mark.parametrize("use_cuda_graph", [(False, False), (False, True)])
def test_what_a_step_copies_is_counted(monkeypatch, use_cuda_graph):
    from flash_dmattn_hf.serving import cache
    from flash_dmattn_hf.serving.layers import served_layers

    model = converted("gemma3n_text")  # layers 2 and 3 use the keys of layers 0 and 1
    layers, counted = served_layers(model), {}
    monkeypatch.setattr(cache, "count_rows", lambda *_, **options: counted.update(options))
    cache.count_requests(model, layers, batching(max_requests_per_batch=8, use_cuda_graph=use_cuda_graph))
    copied = sum(layer.bytes_per_request(model.dtype) for layer in layers.values())
    assert list(layers) == [0, 1] and counted["most_copied"] == 8
    assert counted["copied_bytes"] == copied * sum((True, *use_cuda_graph))


def test_not_even_one_request_fits():
    """The error reaches the caller, not a log of the thread that generates."""
    model = make_model("llama-topk")
    with pytest.raises(ValueError, match="1 request.* must fit into 0% of the .* got room for 0"):
        model.generate_batch(
            [[3, 4]],
            generation_config=greedy_config(),
            continuous_batching_config=batching(num_blocks=None, max_memory_percent=1e-9),
            warmup=False,
        )


def test_what_has_no_row_waits_and_nothing_is_computed_twice():
    """Seven requests, two rows: at most two at once, in order of arrival, every token of every prompt once."""
    model, prompts = make_model("llama-topk"), make_prompts((30, 5, 44, 2, 17, 28, 9))
    engine = Engine(model, num_blocks=2)
    for number, prompt in enumerate(prompts):
        engine.add(str(number), prompt, 4)
    engine.run()
    assert max(map(len, engine.batches)) == 2
    assert sum(new for batch in engine.batches for _, _, new in batch) == sum(map(len, prompts)) + 3 * len(prompts)
    for number, prompt in enumerate(prompts):
        assert engine.results[str(number)].generated_tokens == alone(model, prompt, 4)


def test_a_row_is_empty_for_the_next_request():
    """Not even NaN, which no weight of 0 takes away, goes from one request to another."""
    model, (first, second) = make_model("llama-topk"), make_prompts((30, 3))
    engine = Engine(model, num_blocks=1)
    engine.add("first", first, 3)
    engine.run()
    for slots in engine.cache.live_requests.slots.values():
        slots.keys.fill_(torch.nan)
        slots.values.fill_(torch.nan)
    engine.add("second", second, 3)
    engine.run()
    assert engine.results["second"].generated_tokens == alone(model, second, 3)


def test_an_id_that_is_in_use_is_refused():
    """A second request of the same id would attend to the slots of the first, and free them under it."""
    model, (first, second) = make_model("llama-topk"), make_prompts((30, 21))
    config = greedy_config()
    config.num_return_sequences = 2
    engine = Engine(model, config, num_blocks=2)
    engine.add("x", first, 4)
    for _ in range(2):
        engine.step()
        with pytest.raises(ValueError, match="request_id must be new, got 'x', whose request has not ended"):
            engine.processor.scheduler.add_waiting_request(request("x", second))
        with pytest.raises(ValueError, match="request_id must be new, got 'x__child#0'"):
            engine.processor.scheduler.add_waiting_request(request("x__child#0", second))
    engine.add("y", second, 4)
    engine.step()
    assert list(engine.processor.scheduler.waiting_requests) == ["y"]
    with pytest.raises(ValueError, match="request_id must be new, got 'y'"):
        engine.processor.scheduler.add_waiting_request(request("y", first))
    engine.run()
    engine.add("x", second, 4)
    engine.run()
    for name in ("x", "x__child#0", "y", "y__child#0"):
        assert engine.results[name].generated_tokens == alone(model, second, 4), name


def request(name, prompt):
    from transformers.generation.continuous_batching.requests import RequestState

    return RequestState(request_id=name, initial_tokens=prompt, max_new_tokens=4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_cuda_graph": (True, False)}, "use_cuda_graph must be True, False, .False, True. or .* part of a prompt"),
        ({"use_async_batching": True}, "use_async_batching must be left out"),
        ({"default_compile_level": 1}, "default_compile_level must be left out"),
        ({"max_blocks_per_request": 8}, "max_blocks_per_request must be left out.* one block, whatever its length"),
        ({"cpu_offload_space": 1.0}, "cpu_offload_space must be left out.* no request is ever moved"),
        ({"cpu_offload_space": None}, "cpu_offload_space must be left out"),
        ({"scheduler_type": "best"}, "scheduler_type must be one of .'fifo', 'prefill_first'., got 'best'"),
    ],
)
def test_settings_that_slots_do_not_have(settings, message):
    with pytest.raises(ValueError, match=message):
        make_model("llama-topk").init_continuous_batching(greedy_config(), batching(**settings))


def test_prefill_first():
    model, prompts = make_model("llama-topk"), make_prompts((5, 60))
    engine = Engine(model, scheduler_type="prefill_first")
    for number, prompt in enumerate(prompts):
        engine.add(str(number), prompt, 6)
    engine.run()
    for number, prompt in enumerate(prompts):
        assert engine.results[str(number)].generated_tokens == alone(model, prompt, 6)


def test_settings_may_come_with_the_generation_config():
    config = greedy_config()
    config.continuous_batching_config = batching(num_blocks=3)
    manager = make_model("llama-topk").init_continuous_batching(config)
    assert (manager.continuous_batching_config.num_blocks, manager.continuous_batching_config.page_size) == (3, 4)


def test_settings_stay_as_they_were_given():
    """A manager that starts again counts again how many requests fit."""
    engine = Engine(make_model("llama-topk"), num_blocks=None, max_requests_per_batch=2)
    assert engine.cache.num_blocks > 2 and engine.manager.continuous_batching_config.num_blocks is None


def test_windows_cannot_change_under_live_requests():
    model, (prompt,) = make_model("llama-topk"), make_prompts((9,))
    engine = Engine(model, num_blocks=1)
    engine.add("x", prompt, 4)
    engine.step()
    model.config.flash_dmattn = {**model.config.flash_dmattn, "keep_window_size": 4}
    with pytest.raises(ValueError, match="windows of layer 0 must stay .*keep_window_size=4.* make a new one"):
        engine.step()


def test_layers_that_grow_with_the_text_are_refused():
    model = make_model("llama-topk", flash_dmattn=DynamicMaskConfig(keep_window_size=12, layers=[0]).to_dict())
    with pytest.raises(ValueError, match="gate or a sliding window in every layer, got model.layers.1.self_attn"):
        model.init_continuous_batching(greedy_config(), batching())


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: converted("llama4_text"), "those of a chunk, got model.layers.0.self_attn, .* chunks of 7 tokens"),
        (bart, "nothing but tokens of text, got model.decoder.layers.0.encoder_attn, which attends to the states"),
        (mllama, "nothing but tokens of text, got model.layers.1.cross_attn, which attends to the states"),
    ],
    ids=["llama4", "bart", "mllama"],
)
def test_chunks_and_cross_attention_are_refused(make, reason):
    with pytest.raises(ValueError, match=reason):
        make().init_continuous_batching(greedy_config(), batching())


def test_a_bidirectional_prefix_is_refused():
    """Before the manager exists, not in the thread where every request would fail."""
    message = "got PaliGemmaForConditionalGeneration, whose model.language_model.layers.0.self_attn calls itself bidir"
    with pytest.raises(ValueError, match=message):
        make_with_blocks("paligemma").init_continuous_batching(greedy_config(), batching())
    make_with_blocks("gemma3").init_continuous_batching(greedy_config(), batching())  # its text is causal
