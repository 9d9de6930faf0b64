"""Decoding on a GPU: the captured and the compiled step give what the eager one gives, in memory that does not grow."""

import pytest
import torch
from accelerate import dispatch_model
from transformers import CompileConfig

from flash_dmattn_hf import DynamicMaskCache
from flash_dmattn_hf.cache import cuda_graph as captured

from .. import generation_models
from ..gpu_models import LENGTH, WINDOW, make_model, make_tokens

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU: graphs and compiled Triton kernels"),
]


def padded_prompt():
    input_ids = make_tokens(3, 150)
    mask = torch.ones_like(input_ids)
    mask[0, :40] = mask[1, :141] = 0
    return {"inputs": input_ids, "attention_mask": mask, "do_sample": False}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_captured_generation_gives_the_ids_of_eager_generation(dtype):
    model, prompt = make_model(dtype), padded_prompt()
    eager = model.generate(**prompt, max_new_tokens=200)
    assert torch.equal(model.generate(**prompt, max_new_tokens=200, cache_implementation="static"), eager)


def test_compiled_generation_gives_the_ids_of_eager_generation():
    torch.compiler.reset()
    model, prompt = make_model(), padded_prompt()
    eager = model.generate(**prompt, max_new_tokens=60)
    options = {"cache_implementation": "static", "compile_config": CompileConfig()}
    assert torch.equal(model.generate(**prompt, max_new_tokens=60, **options), eager)


@pytest.mark.parametrize("options", [{}, {"compile_config": CompileConfig()}], ids=["captured", "compiled"])
def test_slots_in_8_bits(options):
    """Graphs hold a step over them as over other slots."""
    torch.compiler.reset()
    model, prompt = make_model(torch.bfloat16), padded_prompt()
    rounding = {"max_new_tokens": 60, "cache_config": {"slot_dtype": "float8_e4m3fn"}}
    eager = model.generate(**prompt, **rounding, return_dict_in_generate=True)
    static = model.generate(
        **prompt, **rounding, **options, cache_implementation="static", return_dict_in_generate=True
    )
    assert {layer.keys.dtype for layer in static.past_key_values.mask_layers} == {torch.float8_e4m3fn}
    same = (static.sequences == eager.sequences).float().mean()
    assert same > 0.9 if options else same == 1  # compiled code rounds differently


@pytest.mark.parametrize("kind", ["llama-sinks-local", "llama-query-heads", "gpt2-mha", "doge"])
def test_captured_in_float64_it_gives_the_ids_of_recomputing_everything(kind, monkeypatch):
    """The reference backend's step is captured, too: it looks at no value."""
    monkeypatch.setenv("FLASH_DMATTN_BACKEND", "reference")
    model = generation_models.make_model(kind).to("cuda")
    ids, mask = (tensor.to("cuda") for tensor in generation_models.left_padded_prompt())
    found = generation_models.greedy(model, ids, mask, new=60, cache_implementation="static")
    assert torch.equal(found, generation_models.greedy(model, ids, mask, new=60, use_cache=False))


@torch.no_grad()
def test_captured_steps_are_near_one_pass_in_float32():
    """No token comes twice, so no importances tie."""
    model, input_ids = make_model(), make_tokens(2)
    expected = model(input_ids, use_cache=False).logits
    cache = DynamicMaskCache(model, static=True)
    forward = captured.StepForward(model, captured.CapturedForward(model))
    logits = [model(input_ids[:, :100], past_key_values=cache).logits]
    for row in range(100, LENGTH):
        token, position = input_ids[:, row : row + 1], torch.full((2, 1), row, device="cuda")
        logits.append(forward(input_ids=token, position_ids=position, past_key_values=cache).logits)
    torch.testing.assert_close(torch.cat(logits, dim=1), expected, atol=1e-3, rtol=1e-3)
    assert cache.max_keys == WINDOW["keep_window_size"] and cache.get_seq_length() == LENGTH


@torch.no_grad()
def test_memory_does_not_grow_with_the_text():
    model, input_ids = make_model(), make_tokens(2)
    cache = DynamicMaskCache(model, static=True)
    forward = captured.StepForward(model, captured.CapturedForward(model))
    model(input_ids[:, :100], past_key_values=cache)
    sizes = []
    for row in range(100, LENGTH):
        token, position = input_ids[:, row : row + 1], torch.full((2, 1), row, device="cuda")
        forward(input_ids=token, position_ids=position, past_key_values=cache)
        sizes.append((torch.cuda.memory_allocated(), cache.nbytes))
    assert len(set(sizes[5:])) == 1


@torch.no_grad()
@pytest.mark.parametrize("away", ["to", "offload"])
def test_a_cache_waits_on_the_cpu_between_captured_steps(away):
    """What was captured before held other addresses."""
    model, input_ids = make_model(), make_tokens(2)
    expected = model(input_ids[:, :140], use_cache=False).logits
    cache = DynamicMaskCache(model, static=True)
    forward = captured.StepForward(model, captured.CapturedForward(model))
    logits = [model(input_ids[:, :100], past_key_values=cache).logits]
    for row in range(100, 140):
        if row in (101, 120):
            cache.to("cpu") if away == "to" else [layer.offload() for layer in cache.mask_layers]
            assert {state.device.type for layer in cache.mask_layers for state in layer.slots} == {"cpu"}
        token, position = input_ids[:, row : row + 1], torch.full((2, 1), row, device="cuda")
        logits.append(forward(input_ids=token, position_ids=position, past_key_values=cache).logits)
    torch.testing.assert_close(torch.cat(logits, dim=1), expected, atol=1e-3, rtol=1e-3)


def test_a_forward_that_waits_for_the_gpu_cannot_be_captured():
    model, prompt = make_model(), padded_prompt()
    model.model.norm.register_forward_hook(lambda module, args, out: out * float(out.isfinite().all()))
    stream = torch.cuda.current_stream()
    with pytest.raises(RuntimeError, match="the forward of LlamaForCausalLM cannot be captured in a CUDA graph"):
        model.generate(**prompt, max_new_tokens=5, cache_implementation="static")
    assert torch.cuda.current_stream() == stream
    torch.cuda.synchronize()
    assert torch.rand(9, device="cuda").isfinite().all()
    assert model.generate(**prompt, max_new_tokens=5).shape[1] == 155


def test_a_capture_that_lacks_memory_says_so():
    model, prompt = make_model(), padded_prompt()

    def fail(module, args, out):
        if torch.cuda.is_current_stream_capturing():
            raise torch.OutOfMemoryError("no memory is left")

    hook = model.model.norm.register_forward_hook(fail)
    with pytest.raises(torch.OutOfMemoryError, match="no memory is left"):
        model.generate(**prompt, max_new_tokens=5, cache_implementation="static")
    hook.remove()
    eager = model.generate(**prompt, max_new_tokens=5)
    assert torch.equal(model.generate(**prompt, max_new_tokens=5, cache_implementation="static"), eager)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs: one that is current, and another one")
def test_a_model_on_a_gpu_that_is_not_current_is_captured_there():
    model = make_model().to("cuda:1")
    prompt = {name: x.to("cuda:1") if isinstance(x, torch.Tensor) else x for name, x in padded_prompt().items()}
    assert torch.cuda.current_device() == 0
    eager = model.generate(**prompt, max_new_tokens=60)
    assert torch.equal(model.generate(**prompt, max_new_tokens=60, cache_implementation="static"), eager)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs: a layer on each")
def test_a_model_spread_over_gpus_runs_without_a_graph():
    model, prompt = make_model(), padded_prompt()
    expected = model.generate(**prompt, max_new_tokens=5)
    first = dict.fromkeys(("model.embed_tokens", "model.rotary_emb", "model.layers.0"), 0)
    spread = dispatch_model(model, {**first, **dict.fromkeys(("model.layers.1", "model.norm", "lm_head"), 1)})
    assert torch.equal(spread.generate(**prompt, max_new_tokens=5), expected)
    assert torch.equal(spread.generate(**prompt, max_new_tokens=5, cache_implementation="static"), expected)
    cache = DynamicMaskCache(spread, static=True)
    step = {"input_ids": prompt["inputs"][:, :1], "position_ids": torch.full((3, 1), 150), "past_key_values": cache}
    with torch.no_grad():
        spread(prompt["inputs"], past_key_values=cache)
        with pytest.raises(RuntimeError, match="needs all layers on one GPU, got cuda:0, cuda:1"):
            captured.StepForward(spread, captured.CapturedForward(spread))(**step)


@torch.no_grad()
@pytest.mark.parametrize("form", ["log_zoh", "zoh"])
def test_the_importance_of_one_token_is_that_of_many(form):
    """One launch for a single token, torch for several."""
    gate = make_model(importance=form).model.layers[0].self_attn.dma
    value = torch.randn(2, gate.num_kv_heads, 5, gate.head_dim, device="cuda")
    single = torch.cat([gate(token) for token in value.split(1, dim=2)], dim=2)
    torch.testing.assert_close(single, gate(value), rtol=1e-5, atol=1e-6)
