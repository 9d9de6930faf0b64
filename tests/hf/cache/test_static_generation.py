"""generate(cache_implementation="static"): the ids of ordinary generation, one compilation, constant shapes."""

import copy

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import CompileConfig, DynamicCache

from flash_dmattn_hf import DynamicMaskCache
from flash_dmattn_hf.cache import cuda_graph as captured

from ..generation_models import KINDS, NEW, PROMPT, greedy, left_padded_prompt, make_model, make_prompt


@pytest.fixture(scope="module", params=KINDS)
def model(request):
    return make_model(request.param)


def compile_config():
    """Traced into one graph, but run by torch as it is: what inductor makes of it is tested on a GPU."""
    config = CompileConfig(fullgraph=True, backend="eager", mode=None)
    config._compile_all_devices = True
    return config


@pytest.fixture
def counted():
    torch.compiler.reset()
    counters.clear()
    return counters["stats"]


def test_its_ids_are_those_of_the_dynamic_cache(model):
    ids, mask = left_padded_prompt()
    result = greedy(model, ids, mask, cache_implementation="static", return_dict_in_generate=True)
    assert result.past_key_values.is_static and result.past_key_values.get_seq_length() == PROMPT + NEW - 1
    assert result.sequences.tolist() == greedy(model, ids, mask).tolist()


def test_compiled_once_for_all_lengths(model, counted):
    ids, mask = left_padded_prompt()
    expected = greedy(model, ids, mask, new=40)
    options = {"cache_implementation": "static", "compile_config": compile_config(), "return_dict_in_generate": True}
    result = greedy(model, ids, mask, new=40, **options)
    assert result.sequences.tolist() == expected.tolist()
    assert result.past_key_values.get_seq_length() == PROMPT + 39
    assert counted["unique_graphs"] == 1, "something depends on the length"


def test_a_step_traces_without_a_break(model, counted):
    """`generate` allows breaks for every name with "flash" in it; there are none."""
    ids, mask = left_padded_prompt()
    past = DynamicMaskCache(model, static=True)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    expected = greedy(model, ids, mask, new=4)
    compiled = captured.StepForward(model, torch.compile(model, fullgraph=True, backend="eager"))
    with torch.no_grad():
        logits = model(ids, attention_mask=mask, position_ids=positions, past_key_values=past).logits
        for step in range(4):
            token = logits[:, -1:].argmax(-1)
            assert token.tolist() == expected[:, PROMPT + step, None].tolist()
            position = positions[:, -1:] + 1 + step
            logits = compiled(input_ids=token, position_ids=position, past_key_values=past).logits
    assert counted["unique_graphs"] == 1


@pytest.mark.parametrize("mode", ["beams", "sampled", "lookup", "chunks", "one-token"])
def test_every_mode_of_generation(mode):
    """Where the step cannot be captured the same cache goes on without."""
    model = make_model("llama-sinks-local")
    ids, mask = make_prompt(batch=1 if mode == "lookup" else 2, length=1 if mode == "one-token" else PROMPT)
    options = {
        "beams": {"num_beams": 3},
        "sampled": {"do_sample": True, "top_k": 5, "num_return_sequences": 2},
        "lookup": {"prompt_lookup_num_tokens": 4},
        "chunks": {"prefill_chunk_size": 9},
        "one-token": {"max_new_tokens": 30},
    }[mode]
    options = {"do_sample": False, "max_new_tokens": NEW, **options}
    found = []
    for static in (True, False):
        torch.manual_seed(0)
        past = DynamicMaskCache(model, static=static)
        found.append(model.generate(ids, attention_mask=mask, past_key_values=past, **options))
    assert found[0].tolist() == found[1].tolist()


def test_a_static_cache_is_reused_over_turns_and_reset(counted):
    """Counting goes on between compiled steps, longer pieces and a reset, and the graph stays the same."""
    model = make_model("llama-sinks-local")
    past = DynamicMaskCache(model, static=True)
    model.generation_config.compile_config = compile_config()
    addresses = None
    for _ in range(2):
        ids, mask = left_padded_prompt()
        for turn in range(2):
            found = greedy(model, ids, mask, past_key_values=past, new=6)
            assert found.tolist() == greedy(model, ids, mask, new=6, use_cache=False).tolist()
            ids = torch.cat([found, make_prompt(batch=3, length=5, seed=turn)[0]], dim=1)
            mask = torch.cat([mask, mask.new_ones(3, ids.shape[1] - mask.shape[1])], dim=1)
        assert past.addresses() == (addresses or past.addresses())
        addresses = past.addresses()
        past.reset()
    assert counted["unique_graphs"] == 1


def test_compiled_steps_cannot_be_undone_but_recorded_tokens_can():
    model = make_model("llama-topk")
    past = DynamicMaskCache(model, static=True)
    ids, mask = make_prompt(length=4)
    options = {"compile_config": compile_config(), "past_key_values": past, "new": 3}
    found = greedy(model, ids, mask, **options)
    with pytest.raises(ValueError, match="tokens_to_remove must be at least 0, got -1"):
        past.crop(-1)
    past.activate_past_recording()
    with torch.no_grad():
        assert not past.takes_captured_steps
        model(make_prompt(length=5, seed=3)[0], past_key_values=past)
        past.crop(-5)
        past.stop_past_recording()
        assert past.takes_captured_steps
    ids = torch.cat([found, make_prompt(length=2, seed=4)[0]], dim=1)
    again = greedy(model, ids, torch.ones_like(ids), **options)
    assert again.tolist() == greedy(model, ids, torch.ones_like(ids), new=3, use_cache=False).tolist()


def test_only_single_tokens_over_a_static_cache_are_run_otherwise():
    model = make_model("llama-topk")
    calls = []
    forward = captured.StepForward(model, lambda **inputs: calls.append(inputs) or model(**inputs))
    ids, _ = make_prompt(length=6)
    position = torch.tensor([[6]])
    token = {"input_ids": ids[:, :1], "position_ids": position}
    with torch.no_grad():
        for past in (DynamicMaskCache(model), DynamicCache(), DynamicMaskCache(model, static=True)):
            forward(input_ids=ids, position_ids=torch.arange(6)[None], past_key_values=past)
            forward(**token, past_key_values=past)
            assert past.get_seq_length() == 7
        assert len(calls) == 1
        forward(input_ids=ids[:, :1], past_key_values=past)
        assert len(calls) == 1, "without positions the length would have to be looked at"
    forward(**token, past_key_values=past)
    assert len(calls) == 1, "a captured forward has no gradient"


def test_a_forward_that_fails_leaves_the_count_alone():
    model = make_model("llama-topk")
    past = DynamicMaskCache(model, static=True)
    ids, _ = make_prompt(length=6)

    def fail(**_):
        raise RuntimeError("broken")

    with torch.no_grad():
        model(ids, past_key_values=past)
        with pytest.raises(RuntimeError, match="broken"):
            captured.StepForward(model, fail)(
                input_ids=ids[:, :1], position_ids=torch.tensor([[6]]), past_key_values=past
            )
        assert past.get_seq_length() == 6
        model(ids[:, :1], past_key_values=past, position_ids=torch.tensor([[6]]))
    assert past.get_seq_length() == 7


def test_a_copy_of_a_static_cache_is_static():
    model = make_model("llama-topk")
    past = DynamicMaskCache(model, static=True)
    ids, _ = make_prompt(length=6)
    with torch.no_grad():
        model(ids, past_key_values=past)
    twin = copy.deepcopy(past)
    assert twin.is_static and twin.is_compileable and set(twin.addresses()).isdisjoint(past.addresses())


def test_what_runs_a_step(monkeypatch):
    """A graph on one GPU, torch.compile where it is asked for, the model itself elsewhere; dense as ever."""
    model = make_model("llama-topk")
    assert model.get_compiled_call(None) == model.__call__
    compiled = model.get_compiled_call(compile_config())
    assert isinstance(compiled, captured.StepForward) and compiled.run is model._compiled_call
    monkeypatch.setattr(type(model), "device", torch.device("cuda"))
    on_gpu = model.get_compiled_call(None)
    assert isinstance(on_gpu, captured.StepForward) and isinstance(on_gpu.run, captured.CapturedForward)
    model.lm_head.to("meta")
    assert model.get_compiled_call(None) == model.__call__, "layers on two devices"
    dense = make_model("llama-topk", implementation="sdpa")
    assert not isinstance(dense.get_compiled_call(compile_config()), captured.StepForward)
