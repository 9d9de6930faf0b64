"""Forwards with part of a prompt, padded and in CUDA graphs on a GPU: with the results of every request alone."""

import pytest
import torch

from flash_dmattn_hf.versions import can_serve
from tests.hf import gpu_models
from tests.hf.converted import converted
from tests.hf.generation_models import VOCAB, make_model
from tests.hf.integration import test_gpu_sinks
from tests.hf.serving.engine import Engine, alone, greedy_config, needs_serving
from tests.hf.serving.test_generate_batch import check_likeliest, make_prompts, make_sink_model, serve_at_random
from tests.hf.serving.test_prefixes import PROMPTS, SHARED, check_results
from tests.hf.serving.test_step_graphs import on_gpu
from tests.hf.tiny import VOCAB_SIZE

pytestmark = needs_serving

if can_serve():
    from flash_dmattn_hf.serving.chunks import PaddedBatch, RowTokens
    from tests.hf.serving.emulated_graphs import emulate_graphs

PADDED = {"use_cuda_graph": (True, True), "max_batch_tokens": 80}
"""Five requests at most: up to five single tokens, and 64 or 72 to 79 of a prompt."""


def check_batches(engine) -> None:
    """Every forward is a step, or single tokens and then part of one prompt, padded."""
    padded = engine.processor.model_runner.padded
    for batch, width in zip(engine.batches, engine.widths, strict=True):
        *singles, last = [new for _, _, new in batch]
        assert all(new == 1 for new in singles)
        if last > 1:
            assert width == sum(padded.sizes_of([RowTokens(*tokens) for tokens in batch]))


def serve(model, lengths=(3, 26, 1, 90, 17), vocab=VOCAB, config=None, **values):
    prompts, engine = make_prompts(lengths, vocab), Engine(model, config, **{"num_blocks": 3, **PADDED, **values})
    for number, prompt in enumerate(prompts):
        engine.add(str(number), prompt, 6)
    engine.run()
    for number, prompt in enumerate(prompts):
        assert engine.results[str(number)].generated_tokens == alone(model, prompt, 6), number
    check_batches(engine)
    return engine


def test_sizes():
    padded = PaddedBatch(6, 200, torch.device("cpu"))
    chunk = RowTokens(9, 0, 70)
    singles = [RowTokens(row, 5, 1) for row in range(6)]
    assert padded.sizes_of([chunk]) == (1, 128) and padded.sizes_of([*singles[:3], chunk]) == (4, 128)
    assert padded.sizes_of([*singles[:5], RowTokens(9, 3, 2)]) == (6, 64)
    assert padded.sizes_of([*singles[:5], RowTokens(9, 3, 194)]) == (6, 194) and padded.most_new(5) == 194
    assert padded.sizes_of([*singles[:5], RowTokens(9, 3, 195)]) is None
    for batch in ([chunk, singles[0]], [chunk, chunk], singles[:2]):
        assert padded.sizes_of(batch) is None
    sizes = padded.all_sizes()
    assert set(sizes) == {(b, c) for b in (1, 2, 4, 6) for c in (64, 128, 200 - b)}
    assert sizes[-1] == (1, 64) and sum(sizes[0]) == 200
    assert PaddedBatch(6, 6, torch.device("cpu")).all_sizes() == [(4, 2), (2, 4), (1, 5)]


@pytest.mark.parametrize("scheduler_type", ["fifo", "prefill_first"])
def test_padded_forwards_change_nothing(scheduler_type):
    """Requests come, end and are cancelled; some prompts are longer than a forward, some share none of it."""
    model = make_model("llama-sinks-local")
    asked, cancelled, engine = serve_at_random(
        model, VOCAB, 20, longest=200, max_new=12, scheduler_type=scheduler_type, **PADDED
    )
    assert set(engine.results) == set(asked) - cancelled and cancelled
    for name, result in engine.results.items():
        assert result.generated_tokens == alone(model, *asked[name]), name
    check_batches(engine)
    assert {width for width in engine.widths if width > 5} >= {65, 66, 68, 80}


@pytest.mark.parametrize("kind", ["llama-topk", "llama-query-heads", "qwen2-sliding-below-w", "doge", "deepseek-v3"])
def test_padded_forwards_of_other_layers(kind):
    assert {80} <= set(serve(make_model(kind)).widths)


def test_where_few_tokens_are_left_for_prompts_they_have_all_of_them():
    """24 tokens of a prompt by itself, unpadded, and 23 beside a single token, padded to themselves."""
    model, (long, short) = make_model("llama-topk"), make_prompts((90, 5))
    engine = Engine(model, **{**PADDED, "max_batch_tokens": 24})
    engine.add("short", short, 9)
    engine.step()
    engine.add("long", long, 3)
    engine.run()
    news = [[new for _, _, new in batch] for batch in engine.batches]
    assert news[:5] == [[5], [1, 23], [1, 23], [1, 23], [1, 21]] and engine.widths[:5] == [24] * 5
    engine.add("again", long, 3)
    engine.step()
    assert [new for _, _, new in engine.batches[-1]] == [24] and engine.widths[-1] == 24
    engine.run()
    assert engine.results["again"].generated_tokens == engine.results["long"].generated_tokens == alone(model, long, 3)
    assert engine.results["short"].generated_tokens == alone(model, short, 9)


def test_padded_forwards_with_sinks():
    serve(make_sink_model(6))


def test_padded_forwards_with_shared_keys_and_slots_in_8_bits():
    model = converted("gemma3n_text")
    model.generation_config.pad_token_id = model.config.eos_token_id = model.generation_config.eos_token_id = None
    serve(model, vocab=VOCAB_SIZE - 1)
    model.generation_config.cache_config = {"slot_dtype": "float8_e4m3fn"}
    config = greedy_config(cache_config=model.generation_config.cache_config)
    serve(model, (3, 26, 1, 70, 17), vocab=VOCAB_SIZE - 1, config=config)


def test_prefixes_and_forks():
    engine = Engine(make_model("llama-sinks-local"), **PADDED)
    for number, prompt in enumerate(PROMPTS):
        engine.add(str(number), prompt, 5)
    engine.run()
    check_results(engine, map(str, range(4)))
    check_batches(engine)
    assert sum(before == SHARED and new > 0 for batch in engine.batches for _, before, new in batch) == 4
    config = greedy_config(do_sample=True, top_k=1, num_return_sequences=3)
    forked, prompts = Engine(engine.model, config, **PADDED), make_prompts((90, 9))
    for number, prompt in enumerate(prompts):
        forked.add(str(number), prompt, 6)
    forked.run()
    answers = sorted(result.generated_tokens for result in forked.results.values())
    assert answers == sorted([alone(engine.model, prompt, 6) for prompt in prompts] * 3)


def test_what_is_replayed_has_the_inputs_of_its_forward(monkeypatch):
    """Emulated: places, rows and parameters of sampling are where the first forward of these sizes had them."""
    model, prompts = make_model("llama-sinks-local"), make_prompts((5, 31, 90, 2, 100, 70, 33))
    engine = Engine(model, greedy_config(do_sample=True, top_k=50), per_request_processors=True, **PADDED)
    graphs = emulate_graphs(engine, monkeypatch)
    for number, prompt in enumerate(prompts):
        engine.add(str(number), prompt, 4 + 3 * number, top_k=1)
    engine.run()
    for number, prompt in enumerate(prompts):
        assert engine.results[str(number)].generated_tokens == alone(model, prompt, 4 + 3 * number)
    of_prompts = [graph for key, graph in graphs.items() if len(key) > 1]
    assert sum(graph.replays for graph in of_prompts) > 3 and len(graphs) > len(of_prompts) > 1


def test_a_warm_up_captures_every_size_and_leaves_nothing(monkeypatch):
    model, prompt = make_model("llama-sinks-local"), make_prompts((170,))[0]
    engine = Engine(model, **PADDED)
    graphs = emulate_graphs(engine, monkeypatch)
    engine.manager.warmup()
    sizes = engine.processor.model_runner.padded.all_sizes()
    assert len(graphs) == len(sizes) + 4 and engine.cache.rows.num_available == 5
    captured = set(graphs)
    engine.add("x", prompt, 5)
    engine.run()
    assert engine.results["x"].generated_tokens == alone(model, prompt, 5) and set(graphs) == captured


def test_a_forward_that_cannot_be_captured(monkeypatch):
    """Who asks for it gets an error; True and nothing ask for steps alone."""
    model = make_model("llama-topk")
    engine = Engine(model, **PADDED)
    emulate_graphs(engine, monkeypatch, lambda: True)
    engine.add("x", make_prompts((17,))[0], 5)
    with pytest.raises(RuntimeError, match="part of a prompt cannot be captured .* use_cuda_graph=.False, True. capt"):
        engine.run()
    for use_cuda_graph in (True, None, (False, True)):
        assert Engine(model, use_cuda_graph=use_cuda_graph).processor.model_runner.padded is None


class TestOnAGpu:
    pytestmark = on_gpu

    @pytest.mark.parametrize("make", [gpu_models.make_model, test_gpu_sinks.make_model], ids=["llama", "gpt_oss"])
    def test_graphs_and_launched_forwards_have_the_same_ids(self, make):
        """float32, both padded alike: what is replayed is what would be launched."""
        model = make()
        if hasattr(model.config, "num_local_experts"):  # those of prompts stay, and a loop over them waits for the GPU
            model.set_experts_implementation("batched_mm")
        results = []
        for launches in (False, True):
            engine = Engine(model, num_blocks=6, page_size=32, use_cuda_graph=(True, True), max_batch_tokens=160)
            if launches:
                engine.processor.model_runner.use_cuda_graph_varlen = False
            for number, prompt in enumerate(make_prompts((5, 90, 200, 33, 64), gpu_models.VOCABULARY)):
                engine.add(str(number), prompt, 6 + 3 * number)
            engine.run()
            check_batches(engine)
            captured = [key for key in engine.processor.inputs_and_outputs.graphs._storage if len(key) > 1]
            assert bool(captured) != launches
            results.append({name: result.generated_tokens for name, result in engine.results.items()})
        assert results[0] == results[1]

    def test_random_requests(self):
        """float32: requests that come, end and are cancelled."""
        model = gpu_models.make_model()
        asked, cancelled, engine = serve_at_random(
            model, gpu_models.VOCABULARY, 24, longest=300, max_new=8, num_blocks=6, max_batch_tokens=160,
            use_cuda_graph=(True, True),
        )  # fmt: skip
        assert set(engine.results) == set(asked) - cancelled
        for name, result in engine.results.items():
            check_likeliest(model, asked[name][0], result.generated_tokens)

    def test_a_warm_up_captures_every_size(self):
        engine = Engine(gpu_models.make_model(), num_blocks=6, max_batch_tokens=160, use_cuda_graph=(True, True))
        engine.manager.warmup()
        graphs = engine.processor.inputs_and_outputs.graphs._storage
        assert len(graphs) == len(engine.processor.model_runner.padded.all_sizes()) + 4
        captured, prompt = set(graphs), make_prompts((400,), gpu_models.VOCABULARY)[0]
        engine.add("x", prompt, 5)
        engine.run()
        check_likeliest(engine.model, prompt, engine.results["x"].generated_tokens)
        assert set(graphs) == captured

    def test_float64_is_attended_to_by_a_reference_that_waits_for_the_gpu(self):
        engine = Engine(gpu_models.make_model(torch.float64), use_cuda_graph=(True, True), max_batch_tokens=160)
        engine.add("x", make_prompts((40,), gpu_models.VOCABULARY)[0], 5)
        with pytest.raises(RuntimeError, match="with part of a prompt cannot be captured"):
            engine.run()
        torch.randn(1, device="cuda")
