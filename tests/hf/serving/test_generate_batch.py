"""Continuous batching makes of every request what generate() makes of it alone, whatever else goes on."""

import random

import pytest
import torch

from flash_dmattn_hf import dynamic_mask_config, iter_gates
from tests.hf import gpu_models
from tests.hf.converted import WINDOW, converted
from tests.hf.generation_models import KINDS, VOCAB, make_model
from tests.hf.serving.engine import Engine, alone, batching, greedy_config, needs_serving
from tests.hf.tiny import VOCAB_SIZE, build, tiny_config

pytestmark = needs_serving


def make_prompts(lengths, vocab=VOCAB, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, vocab, (length,), generator=generator).tolist() for length in lengths]


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_generate_batch(kind):
    """Prompts shorter and longer than the window and than a batch; more of them than there are rows."""
    model, prompts = make_model(kind), make_prompts((3, 26, 1, 40, 17))
    results = model.generate_batch(
        prompts, generation_config=greedy_config(), continuous_batching_config=batching(num_blocks=3)
    )
    assert [result.generated_tokens for result in results.values()] == [alone(model, prompt, 6) for prompt in prompts]


@pytest.mark.parametrize("sliding_window", [10, 6], ids=["gates", "native-sliding"])
def test_attention_sinks(sliding_window):
    """Far from zero: in chunks, in single tokens beside a chunk, and in steps."""
    model, prompts = make_sink_model(sliding_window), make_prompts((3, 26, 1, 40, 17))
    results = model.generate_batch(
        prompts, generation_config=greedy_config(), continuous_batching_config=batching(num_blocks=3)
    )
    answers = [result.generated_tokens for result in results.values()]
    assert answers == [alone(model, prompt, 6) for prompt in prompts]
    for layer in model.model.layers:
        layer.self_attn.sinks.data.fill_(-torch.inf)
    assert answers != [alone(model, prompt, 6) for prompt in prompts]


@pytest.mark.parametrize(
    ("family", "layers"), [("gemma3n_text", None), ("gemma3n_text", [1]), ("gemma4_text", None)], ids=str
)
def test_keys_that_layers_share(family, layers):
    """Gates and a native sliding layer make them; slots are those of the layers that do."""
    model, prompts = converted(family, layers=layers), make_prompts((3, 26, 1, 40, 17), vocab=VOCAB_SIZE - 1)
    model.generation_config.pad_token_id = model.config.eos_token_id = model.generation_config.eos_token_id = None
    engine = Engine(model, num_blocks=3, use_cuda_graph=True)
    for number, prompt in enumerate(prompts):
        engine.add(str(number), prompt, 6)
    engine.run()
    for number, prompt in enumerate(prompts):
        assert engine.results[str(number)].generated_tokens == alone(model, prompt, 6)
    assert set(engine.cache.live_requests.slots) == {0, 1}


@pytest.mark.parametrize("kind", ["llama-sinks-local", "gemma3n_text"])
def test_slots_in_8_bits(kind):
    """As generate() has them where a prompt is one chunk; in the second model layers read slots of earlier ones."""
    from flash_dmattn_hf.serving.server import check_room

    model = converted(kind) if kind == "gemma3n_text" else make_model(kind)
    model.config.eos_token_id = model.generation_config.eos_token_id = None
    model.generation_config.cache_config = {"slot_dtype": "float8_e4m3fn"}
    prompts = make_prompts((3, 1, 40, 17), vocab=min(VOCAB, VOCAB_SIZE - 1))
    config = greedy_config(cache_config=model.generation_config.cache_config)
    engine = Engine(model, config, num_blocks=3, max_batch_tokens=128)
    for number, prompt in enumerate(prompts):
        engine.add(str(number), prompt, 6)
    engine.run()
    for number, prompt in enumerate(prompts):
        assert engine.results[str(number)].generated_tokens == alone(model, prompt, 6)
    slots = engine.cache.live_requests.slots
    assert {state.keys.dtype for state in slots.values()} == {torch.float8_e4m3fn}
    assert engine.cache.bytes_per_sector * 3 == sum(state.nbytes for each in slots.values() for state in each)
    assert check_room(model, batching(num_blocks=3)) == (3, engine.cache.bytes_per_sector)
    assert engine.cache.bytes_per_sector < Engine(model, num_blocks=3).cache.bytes_per_sector / 2


def test_a_kept_manager_has_the_slots_that_are_asked_for():
    model, prompts = make_model("llama-sinks-local"), make_prompts((40, 17))
    rounded = greedy_config(cache_config={"slot_dtype": "float8_e4m3fn"})

    def generated(config):
        results = model.generate_batch(prompts, config, batching(), persistent_manager=True)
        return [result.generated_tokens for result in results.values()]

    expected = generated(rounded)
    assert generated(rounded) == generated(None) == expected
    message = "slot_dtype of cache_config must be {}, that of the manager which the model keeps .*, got {}"
    with pytest.raises(ValueError, match=message.format("torch.float8_e4m3fn", None)):
        generated(greedy_config())
    model.destroy_cached_continuous_batching_manager()
    generated(greedy_config())
    with pytest.raises(ValueError, match=message.format(None, "torch.float8_e4m3fn")):
        generated(rounded)
    model.generation_config.cache_config = rounded.cache_config
    with pytest.raises(ValueError, match=message.format(None, "torch.float8_e4m3fn")):
        generated(None)
    model.destroy_cached_continuous_batching_manager()


def make_sink_model(sliding_window):
    """A tiny gpt_oss, whose logits follow its attention more than its experts."""
    torch.manual_seed(0)
    with dynamic_mask_config(**WINDOW):
        config = tiny_config("gpt_oss", sliding_window=sliding_window, vocab_size=VOCAB, eos_token_id=None)
        model = build(config, attn_implementation="flash_dmattn").double().eval()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.sinks.normal_(std=2.0)
            layer.self_attn.o_proj.weight.mul_(5)
        for _, _, gate in iter_gates(model):
            gate.A.normal_()
            gate.dt_proj.weight.normal_()
    return model


def serve_at_random(model, vocab, num_requests, longest, max_new, **values):
    """Requests come at random times and some are cancelled; returns what was asked for and the engine at the end."""
    choose = random.Random(0)
    lengths = [choose.randint(1, longest) for _ in range(num_requests)]
    news = [choose.randint(1, max_new) for _ in lengths]
    asked = dict(enumerate(zip(make_prompts(lengths, vocab), news, strict=True)))
    engine = Engine(model, **values)
    waiting, cancelled = list(asked), set()
    while waiting or engine.processor.has_pending_requests():
        for _ in range(min(len(waiting), choose.choice((0, 0, 1, 3)))):
            number = waiting.pop(0)
            engine.add(str(number), *asked[number], streaming=number % 3 == 0)
        if choose.random() < 0.15 and engine.processor.scheduler.active_requests:
            name = choose.choice(sorted(engine.processor.scheduler.active_requests))
            engine.manager.cancel_request(name)
            cancelled.add(name)
        engine.step()
    return {str(number): request for number, request in asked.items()}, cancelled, engine


def test_64_random_requests_with_arrivals_and_cancellations():
    model = make_model("llama-sinks-local")
    asked, cancelled, engine = serve_at_random(model, VOCAB, 64, longest=45, max_new=8)
    assert 5 < len(cancelled) < 25
    assert set(engine.results) == set(asked) - cancelled
    for name, result in engine.results.items():
        assert result.generated_tokens == alone(model, *asked[name]), name
        if int(name) % 3 == 0:  # streamed, token by token
            assert [len(tokens) for tokens in engine.streamed[name]] == list(range(1, asked[name][1] + 1))
    assert engine.cache.rows.num_available == engine.cache.num_blocks and not engine.cache.rows.held


def test_a_chunk_and_single_tokens_in_one_forward():
    model, (short, long) = make_model("llama-topk"), make_prompts((5, 60))
    engine = Engine(model)
    engine.add("short", short, 8)
    engine.step()
    engine.add("long", long, 3)
    engine.run()
    news = [[new for _, _, new in batch] for batch in engine.batches]
    assert news[:4] == [[5], [1, 23], [1, 23], [1, 14]]
    assert engine.results["short"].generated_tokens == alone(model, short, 8)
    assert engine.results["long"].generated_tokens == alone(model, long, 3)


def test_several_sequences_of_a_prompt():
    """A request forks into rows that were kept for it: equal ones, when nothing is drawn at random."""
    model, (prompt, other) = make_model("llama-sinks-local"), make_prompts((37, 9))
    config = greedy_config(do_sample=True, top_k=1, num_return_sequences=3)
    results = model.generate_batch([prompt, other], generation_config=config, continuous_batching_config=batching())
    expected = [alone(model, prompt, 6)] * 3 + [alone(model, other, 6)] * 3
    assert [result.generated_tokens for result in results.values()] == expected


def test_more_sequences_than_rows_and_empty_prompts_fail_alone():
    engine = Engine(make_model("llama-topk"), greedy_config(do_sample=True, num_return_sequences=3), num_blocks=2)
    engine.add("many", [3, 4, 5], 2)
    engine.run()
    assert "num_return_sequences of request many must be at most 2" in engine.results["many"].error
    engine = Engine(engine.model)
    engine.add("none", [], 2)
    engine.add("some", [3, 4, 5], 2)
    engine.run()
    assert "must have at least 1 token(s)" in engine.results["none"].error
    assert engine.results["some"].generated_tokens == alone(engine.model, [3, 4, 5], 2)


def test_sampling_parameters_per_request():
    """Of one candidate the sample is the greedy one; a hot request beside it is not."""
    model, (prompt,) = make_model("llama-topk"), make_prompts((20,))
    config = greedy_config(do_sample=True, top_k=5, temperature=2.0)
    engine = Engine(model, config, per_request_processors=True, allow_block_sharing=False, seed=0)
    engine.add("cold", prompt, 8, top_k=1)
    engine.add("hot", prompt, 8, temperature=100.0)
    engine.run()
    assert engine.results["cold"].generated_tokens == alone(model, prompt, 8)
    assert engine.results["hot"].generated_tokens != alone(model, prompt, 8)


def test_generate_with_a_paged_cache():
    """As transformers spells continuous batching inside generate()."""
    model, (prompt,) = make_model("llama-topk"), make_prompts((30,))
    out = model.generate(torch.tensor([prompt]), cache_implementation="paged", max_new_tokens=6, do_sample=False)
    assert out.flatten().tolist() == prompt + alone(model, prompt, 6)


def test_a_manager_that_is_kept_serves_again():
    model, prompts = make_model("llama-topk"), make_prompts((9, 30))
    for _ in range(2):
        results = model.generate_batch(
            prompts,
            generation_config=greedy_config(),
            continuous_batching_config=batching(),
            persistent_manager=True,
        )
        assert [result.generated_tokens for result in results.values()] == [alone(model, p, 6) for p in prompts]
    model.destroy_cached_continuous_batching_manager()


def test_a_dense_model_keeps_its_pages():
    model = make_model("llama-topk", implementation="sdpa", dtype=torch.float32)
    manager = model.init_continuous_batching(greedy_config(), batching())
    assert type(manager).__name__ == "ContinuousBatchingManager"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_64_random_requests_on_a_gpu():
    """float32."""
    model = gpu_models.make_model()
    asked, cancelled, engine = serve_at_random(
        model, gpu_models.VOCABULARY, 64, longest=300, max_new=16, max_batch_tokens=128, num_blocks=16, page_size=32
    )
    assert set(engine.results) == set(asked) - cancelled
    for name, result in engine.results.items():
        check_likeliest(model, asked[name][0], result.generated_tokens)


def check_likeliest(model, prompt: list[int], answer: list[int]) -> None:
    """In one pass over prompt and answer, the logit of every token that was chosen is the highest to 1e-3."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt + answer], device=model.device), use_cache=False).logits[0]
    logits = logits[len(prompt) - 1 : -1]
    chosen = logits.gather(1, torch.tensor(answer, device=model.device).unsqueeze(1))
    torch.testing.assert_close(chosen, logits.max(-1, keepdim=True).values, atol=1e-3, rtol=1e-3)
