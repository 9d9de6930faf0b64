"""Steps over a padded number of requests, in CUDA graphs on a GPU: with the results of every request alone."""

import logging

import pytest
import torch

from flash_dmattn_hf.versions import can_serve
from tests.hf import gpu_models
from tests.hf.generation_models import VOCAB, make_model
from tests.hf.integration import test_gpu_sinks
from tests.hf.serving.engine import Engine, alone, batching, greedy_config, needs_serving
from tests.hf.serving.test_generate_batch import make_prompts, serve_at_random

pytestmark = needs_serving

if can_serve():
    from tests.hf.serving.emulated_graphs import emulate_graphs

on_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]


def test_padded_steps_change_nothing():
    """Steps have 1, 2, 4 or all 5 tokens, forwards with a chunk what they bring, whoever comes and goes."""
    model = make_model("llama-sinks-local")
    asked, cancelled, engine = serve_at_random(model, VOCAB, 16, longest=30, max_new=20, use_cuda_graph=True)
    assert set(engine.results) == set(asked) - cancelled
    for name, result in engine.results.items():
        assert result.generated_tokens == alone(model, *asked[name]), name
    padding = set()
    for batch, width in zip(engine.batches, engine.widths, strict=True):
        if any(new > 1 for _, _, new in batch):
            assert width == sum(new for _, _, new in batch)
        else:
            padding.add((len(batch), width))
    assert {width for _, width in padding} <= {1, 2, 4, 5} and (3, 4) in padding
    assert not engine.processor.model_runner.use_cuda_graph_decode


@pytest.mark.parametrize("kind", ["llama-query-heads", "qwen2-sliding-above-w", "qwen2-sliding-below-w", "doge"])
def test_padded_steps_of_other_layers(kind):
    model, prompts = make_model(kind), make_prompts((3, 26, 19))
    engine = Engine(model, use_cuda_graph=True)
    for number, prompt in enumerate(prompts):
        engine.add(str(number), prompt, 8)
    engine.run()
    assert 4 in engine.widths
    for number, prompt in enumerate(prompts):
        assert engine.results[str(number)].generated_tokens == alone(model, prompt, 8)


@pytest.mark.parametrize("use_cuda_graph", [False, None, (False, False)])
def test_nothing_is_padded_without_graphs(use_cuda_graph):
    engine = Engine(make_model("llama-topk"), use_cuda_graph=use_cuda_graph)
    for number in range(3):
        engine.add(str(number), [3, 4 + number], 3)
    engine.run()
    assert engine.widths == [6, 3, 3]


def test_what_is_replayed_has_the_inputs_of_its_step(monkeypatch):
    """Emulated: every replay finds tokens, positions, rows and parameters of sampling where the first step had them."""
    model, prompts = make_model("llama-sinks-local"), make_prompts((5, 31, 18, 2, 40))
    config = greedy_config(do_sample=True, top_k=50)
    engine = Engine(model, config, num_blocks=3, per_request_processors=True)
    graphs = emulate_graphs(engine, monkeypatch)
    for number, prompt in enumerate(prompts):
        engine.add(str(number), prompt, 4 + 3 * number, top_k=1)
    engine.run()
    for number, prompt in enumerate(prompts):
        assert engine.results[str(number)].generated_tokens == alone(model, prompt, 4 + 3 * number)
    assert graphs.keys() <= {(1,), (2,), (3,)} and sum(graph.replays for graph in graphs.values()) > 5


def test_a_warm_up_captures_every_number_and_leaves_nothing(monkeypatch):
    model, prompt = make_model("llama-sinks-local"), make_prompts((17,))[0]
    engine = Engine(model, num_blocks=6)
    graphs = emulate_graphs(engine, monkeypatch)
    engine.manager.warmup()
    assert graphs.keys() == {(1,), (2,), (4,), (6,)} and engine.cache.rows.num_available == 6
    engine.add("x", prompt, 5)
    engine.run()
    assert engine.results["x"].generated_tokens == alone(model, prompt, 5)
    assert graphs[(1,)].replays == 4 and len(graphs) == 4


def test_a_model_that_cannot_be_captured(monkeypatch, caplog):
    """It is served without graphs, from the step on at which that was found; who asked for graphs gets an error."""
    model, prompt = make_model("llama-topk"), make_prompts((17,))[0]
    engine = Engine(model)
    graphs = emulate_graphs(engine, monkeypatch, refuses=lambda: True)
    engine.add("x", prompt, 5)
    with caplog.at_level(logging.WARNING):
        engine.run()
    assert engine.results["x"].generated_tokens == alone(model, prompt, 5) and not graphs
    assert caplog.text.count("LlamaForCausalLM cannot be captured in a CUDA graph, so its steps are launched") == 1
    engine = Engine(model, use_cuda_graph=True)
    emulate_graphs(engine, monkeypatch, refuses=lambda: True)
    engine.add("x", prompt, 5)
    with pytest.raises(RuntimeError, match="cannot be captured in a CUDA graph: leave use_cuda_graph out"):
        engine.run()


def test_graphs_need_memory_of_their_own(monkeypatch):
    from flash_dmattn_hf.serving import cache
    from flash_dmattn_hf.serving.layers import served_layers

    model, workspaces = make_model("llama-topk"), []
    monkeypatch.setattr(cache, "count_rows", lambda size, workspace, **_: workspaces.append(workspace))
    for use_cuda_graph in ((False, False), (False, True), (True, True)):
        settings = batching(max_requests_per_batch=8, use_cuda_graph=use_cuda_graph)
        cache.count_requests(model, served_layers(model), settings)
    assert workspaces[2] > workspaces[1]
    assert workspaces[1] - workspaces[0] >= 8 * (model.config.vocab_size + model.config.hidden_size) * 8


def serve(model, **values):
    """Serves prompts of several lengths, and returns the engine at the end and their answers."""
    options = {"num_blocks": 6, "max_batch_tokens": 128, "page_size": 32, **values}
    generation_config = options.pop("generation_config", None)
    engine = Engine(model, generation_config, **options)
    for number, prompt in enumerate(make_prompts((5, 90, 200, 33, 64), gpu_models.VOCABULARY)):
        engine.add(str(number), prompt, 6 + 3 * number)
    engine.run()
    return engine, {name: result.generated_tokens for name, result in engine.results.items()}


def captured(engine) -> set[int]:
    """For which numbers of tokens a step was captured."""
    return {number for (number,) in engine.processor.inputs_and_outputs.graphs._storage}


def launch(runner, use_block_table: bool):
    """What forwards run through, and that no graph is used."""
    return runner._forward_process_and_sample, False


class TestOnAGpu:
    pytestmark = on_gpu

    @pytest.mark.parametrize("make", [gpu_models.make_model, test_gpu_sinks.make_model], ids=["llama", "gpt_oss"])
    def test_graphs_and_eager_steps_have_the_same_ids(self, make):
        """float32, both padded alike: what is replayed is what would be launched."""
        model = make()
        engine, replayed = serve(model)
        assert captured(engine) >= {1, 2, 4}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(engine.processor.model_runner), "_get_forward_fn", launch)
            eager_engine, eager = serve(model)
        assert not captured(eager_engine) and eager_engine.widths == engine.widths
        assert replayed == eager

    def test_graphs_and_generate_have_the_same_ids(self):
        """float64: requests that come, end and are cancelled."""
        model = gpu_models.make_model(torch.float64)
        asked, cancelled, engine = serve_at_random(
            model, gpu_models.VOCABULARY, 16, longest=90, max_new=8, max_batch_tokens=64, num_blocks=6
        )
        assert captured(engine)
        assert set(engine.results) == set(asked) - cancelled
        for name, result in engine.results.items():
            assert result.generated_tokens == alone(model, *asked[name]), name

    def test_a_warm_up_captures_every_number_of_requests(self):
        engine = Engine(gpu_models.make_model(), num_blocks=6, max_batch_tokens=128, page_size=32)
        engine.manager.warmup()
        assert captured(engine) == {1, 2, 4, 6} and engine.cache.rows.num_available == 6
        prompt = make_prompts((40,), gpu_models.VOCABULARY)[0]
        engine.add("x", prompt, 5)
        engine.run()
        assert engine.results["x"].generated_tokens == alone(engine.model, prompt, 5)
        assert captured(engine) == {1, 2, 4, 6}

    def test_tokens_drawn_at_random_inside_a_graph(self):
        """top_k=1 leaves one token to draw: the likeliest."""
        model = gpu_models.make_model()
        _, expected = serve(model)
        config = greedy_config(do_sample=True, top_k=1)
        engine, drawn = serve(model, generation_config=config)
        assert captured(engine) and drawn == expected

    def test_a_model_that_waits_for_the_gpu_is_not_captured(self, caplog):
        """It says so once, and its requests are served without graphs; who asked for graphs gets an error."""
        model = gpu_models.make_model()
        _, expected = serve(model, use_cuda_graph=False)
        model.model.layers[0].register_forward_hook(lambda *_: torch.cuda.current_stream().synchronize())
        with caplog.at_level(logging.WARNING):
            engine, found = serve(model)
        assert not captured(engine) and found == expected
        assert caplog.text.count("cannot be captured in a CUDA graph, so its steps are launched") == 1
        torch.randn(1, device="cuda")
        with pytest.raises(RuntimeError, match="cannot be captured in a CUDA graph: leave use_cuda_graph out"):
            serve(model, use_cuda_graph=True)
