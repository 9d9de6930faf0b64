"""Experts that cannot be captured are others in captured steps, and only there."""

import logging

import pytest
import torch

from flash_dmattn_hf.versions import can_serve
from tests.hf.converted import converted
from tests.hf.generation_models import make_model
from tests.hf.serving.engine import Engine, alone, needs_serving
from tests.hf.serving.test_generate_batch import make_prompts, make_sink_model

pytestmark = needs_serving

if can_serve():
    from flash_dmattn_hf.serving.experts import StepExperts, copied_bytes_per_token
    from tests.hf.serving.emulated_graphs import emulate_graphs


def kind_of(model) -> str:
    return model.config._experts_implementation


def serve(model, monkeypatch, refuses, **values):
    """Returns the engine after three requests, its graphs, and with which experts forwards of so many tokens ran."""
    engine, prompts, ran = Engine(model, num_blocks=3, **values), make_prompts((5, 31, 18)), []
    graphs = emulate_graphs(engine, monkeypatch, refuses)
    hook = model.register_forward_pre_hook(
        lambda _, args, options: ran.append((options["input_ids"].shape[1], kind_of(model))), with_kwargs=True
    )
    for number, prompt in enumerate(prompts):
        engine.add(str(number), prompt, 4 + 3 * number)
    engine.run()
    hook.remove()
    for number, prompt in enumerate(prompts):
        assert engine.results[str(number)].generated_tokens == alone(model, prompt, 4 + 3 * number)
    return engine, graphs, ran


@pytest.mark.parametrize("is_foreseen", [True, False])
def test_steps_are_captured_with_experts_that_can_be(is_foreseen, monkeypatch, caplog):
    model = make_sink_model(10)
    if not is_foreseen:
        monkeypatch.setattr(StepExperts, "choose", lambda experts, *_: setattr(experts, "switched", False))
    with caplog.at_level(logging.WARNING):
        engine, graphs, ran = serve(model, monkeypatch, lambda: kind_of(model) == "eager", use_cuda_graph=True)
    assert (
        engine.processor.model_runner.experts.switched and kind_of(model) == "eager" and "captured" not in caplog.text
    )
    assert (1,) in graphs and {number for number, kind in ran if kind == "batched_mm"} <= {1, 2, 3}
    assert {kind for number, kind in ran if number > 3} == {"eager"}


@pytest.mark.parametrize(
    ("kind", "dtype", "switched"),
    [
        ("eager", torch.bfloat16, True),
        ("grouped_mm", torch.bfloat16, False),
        ("grouped_mm", torch.float32, True),
        ("batched_mm", torch.float32, False),
    ],
)
def test_which_experts_steps_have(kind, dtype, switched):
    model, experts = converted("qwen3_moe").to(dtype), StepExperts()
    model.set_experts_implementation(kind)
    experts.choose(model, 2**40)
    assert experts.switched == switched
    if not switched:  # unless it cannot be captured
        assert experts.switch(model, 2**40) == (kind == "grouped_mm")


def test_what_no_experts_help_is_not_captured(monkeypatch, caplog):
    model = make_sink_model(10)
    with caplog.at_level(logging.WARNING):
        engine, graphs, _ = serve(model, monkeypatch, lambda: True)
    assert not graphs and not engine.processor.model_runner.experts.switched and kind_of(model) == "eager"
    assert caplog.text.count("GptOssForCausalLM cannot be captured in a CUDA graph, so its steps are launched") == 1


def test_a_warm_up_captures_every_number_with_other_experts(monkeypatch):
    model = make_sink_model(10)
    engine = Engine(model, num_blocks=6)
    graphs = emulate_graphs(engine, monkeypatch, lambda: kind_of(model) == "eager")
    engine.manager.warmup()
    assert graphs.keys() == {(1,), (2,), (4,), (6,)} and kind_of(model) == "eager"


def test_steps_without_room_for_copies_of_weights_keep_their_experts(monkeypatch):
    from flash_dmattn_hf.serving import runner

    model = make_sink_model(10)
    free = 2 * copied_bytes_per_token(model)
    monkeypatch.setattr(runner, "get_device_and_memory_breakdown", lambda: (None, free, 0, 0))
    engine, graphs, ran = serve(model, monkeypatch, lambda: kind_of(model) == "eager")
    assert engine.processor.model_runner.experts.most_tokens == 1 and graphs.keys() == {(1,)}
    assert {kind for number, kind in ran if number > 1} == {"eager"}


@pytest.mark.parametrize("family", ["gpt_oss", "qwen3_moe", "mixtral"])
def test_experts_are_put_back_after_an_error(family):
    model, experts = converted(family), StepExperts()
    with experts.in_place(model):
        assert kind_of(model) == "eager"
    experts.choose(model, 2**40)
    with pytest.raises(RuntimeError, match="inside"), experts.in_place(model):
        assert kind_of(model) == "batched_mm"
        raise RuntimeError("inside")
    assert kind_of(model) == "eager" and not experts.switch(model, 2**40) and not experts.switched


def test_copied_weights():
    model = converted("mixtral")
    config, weight = model.config, model.model.layers[0].mlp.experts.gate_up_proj
    size = config.num_experts_per_tok * 2 * config.intermediate_size * config.hidden_size * weight.itemsize
    assert copied_bytes_per_token(model) == size
    dense = make_model("llama-topk")
    assert copied_bytes_per_token(dense) == 0 and not StepExperts().switch(dense, 2**40)
