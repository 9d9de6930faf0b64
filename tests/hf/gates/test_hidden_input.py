"""importance_input="hidden": the importance follows from what the layer's projections read, everywhere."""

import concurrent.futures
import copy
import sys
import threading
import warnings

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, DynamicCache

from flash_dmattn_hf import (
    DynamicMaskCache,
    DynamicMaskConfig,
    convert_model,
    dynamic_mask_config,
    iter_gates,
    soft_selection,
)
from flash_dmattn_hf.conversion.variants import dense
from flash_dmattn_hf.gates import hidden_states
from flash_dmattn_hf.gates.importance import importance_of
from flash_dmattn_hf.training import freeze_all_but_importance, probe

from ..converted import WINDOW, converted
from ..dense_definition import by_definition
from ..tiny import FAMILIES, build, tiny_config, tiny_model, tokens

HIDDEN = {"importance_input": "hidden"}
DISTINCT = torch.arange(3, 93).reshape(2, 45)


def left_padded(length=24):
    mask = torch.ones(2, length, dtype=torch.long)
    mask[0, :5] = 0
    return {"input_ids": tokens(2, length), "attention_mask": mask}


def logits_of(model, ids=DISTINCT, **inputs):
    return model(input_ids=ids, **{"use_cache": False, **inputs}).logits


def gradients(model):
    return {name.replace("_orig_mod.", ""): parameter.grad for name, parameter in model.named_parameters()}


@pytest.fixture(autouse=True)
def nothing_stays_behind():
    yield
    assert hidden_states._offer.slot.content is None


@pytest.mark.parametrize("model_type", FAMILIES)
def test_family_equals_the_definition(model_type):
    model = converted(model_type, **HIDDEN).train()
    inputs = left_padded()
    real = inputs["attention_mask"].bool()
    results = []
    for context in (torch.enable_grad(), by_definition(model)):
        model.zero_grad()
        with context:
            logits = model(**inputs, use_cache=False).logits[real]
            logits.square().sum().backward()
        results.append((logits.detach(), gradients(model)))
    (ours, our_gradients), (expected, gradients_expected) = results
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)
    for name, gradient in gradients_expected.items():
        if gradient is not None:
            torch.testing.assert_close(our_gradients[name], gradient, atol=1e-4, rtol=1e-4, msg=name)
    for _, module, gate in iter_gates(model):
        assert gate.dt_proj.weight.shape == (gate.num_kv_heads, 32)
        assert gate.dt_proj.weight.grad.abs().max() > 0, module


@pytest.mark.parametrize("model_type", FAMILIES)
def test_family_generates_as_without_a_cache(model_type):
    model, inputs = converted(model_type, **HIDDEN), left_padded(14)
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    cached = model.generate(**inputs, **options)
    assert torch.equal(cached, model.generate(**inputs, **options, use_cache=False))


@torch.no_grad()
@pytest.mark.parametrize("heads", ["kv", "query"])
@pytest.mark.parametrize("pieces", [[45], [1] * 45, [7, 1, 1, 20, 1, 15]], ids=["whole", "single tokens", "mixed"])
def test_a_cache_gives_what_one_pass_gives(heads, pieces):
    model = converted(importance_heads=heads, **HIDDEN)
    past = DynamicMaskCache(model)
    found = [model(piece, past_key_values=past).logits for piece in DISTINCT.split(pieces, dim=1)]
    torch.testing.assert_close(torch.cat(found, dim=1), logits_of(model))
    assert past.max_keys == WINDOW["keep_window_size"]


@torch.no_grad()
@pytest.mark.parametrize(
    "options",
    [{"cache_implementation": "static"}, {"prompt_lookup_num_tokens": 3}, {"num_beams": 3}],
    ids=lambda options: next(iter(options)),
)
def test_every_way_of_generating(options):
    model, prompt = converted(**HIDDEN), DISTINCT[:1, :20].repeat(1, 2)
    common = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    plain = {name: value for name, value in options.items() if name == "num_beams"}
    expected = model.generate(prompt, **common, **plain, use_cache=False)
    assert torch.equal(model.generate(prompt, **common, **options), expected)


@torch.no_grad()
def test_the_importance_is_that_of_the_hidden_state_and_differs_from_that_of_values():
    model, seen = converted(**HIDDEN), {}
    for name, module, _ in iter_gates(model):
        module.q_proj.register_forward_hook(lambda _, args, out, name=name: seen.update({name: args[0]}))
    found = probe(model, DISTINCT[0]).importance
    for (name, _, gate), importance in zip(iter_gates(model), found, strict=True):
        expected = gate.A * F.softplus(seen[name][0] @ gate.dt_proj.weight.T)
        torch.testing.assert_close(importance, expected.T.float())


@torch.no_grad()
def test_a_cache_of_transformers_serves_one_pass_and_refuses_the_next():
    model, past = converted(**HIDDEN), DynamicCache()
    assert torch.equal(model(DISTINCT, past_key_values=past).logits, logits_of(model))
    with pytest.raises(ValueError, match="hidden states of all 47 tokens of layer 0, got those of the last 2"):
        model(DISTINCT[:, :2], past_key_values=past)


@torch.no_grad()
def test_a_cache_of_another_model_is_refused():
    model, other = converted(**HIDDEN), converted(**HIDDEN)
    with pytest.raises(RuntimeError, match="the hidden states of layer 0 did not reach .* of this very model"):
        model(DISTINCT, past_key_values=DynamicMaskCache(other))


@torch.no_grad()
def test_hidden_states_may_come_by_position_or_name_and_are_taken_once():
    model = converted(**HIDDEN)
    layer = model.model.layers[0]
    hidden = torch.randn(2, 45, 32, dtype=torch.float64)
    rotary = model.model.rotary_emb(hidden, torch.arange(45)[None])
    by_name = layer.self_attn(hidden_states=hidden, position_embeddings=rotary, attention_mask=None)[0]
    by_position = layer.self_attn(hidden, position_embeddings=rotary, attention_mask=None)[0]
    assert torch.equal(by_name, by_position)
    value = torch.zeros(2, 2, 45, 8, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="layer 0 did not reach its importance gate: they are taken once"):
        importance_of(layer.self_attn.dma, value)


@torch.no_grad()
def test_nothing_is_kept_when_nobody_takes_it_or_the_forward_breaks(monkeypatch):
    model = converted(**HIDDEN)
    expected = logits_of(model)
    with dense(model):
        logits_of(model)
        assert hidden_states._offer.slot.content is None
    with monkeypatch.context() as patch:
        patch.setattr(model.model.layers[1].self_attn.v_proj, "forward", lambda _: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            logits_of(model)
    assert hidden_states._offer.slot.content is None
    assert torch.equal(logits_of(model), expected)


def test_eight_threads_find_what_one_finds():
    model, number_of_threads = converted(**HIDDEN), 8
    barrier = threading.Barrier(number_of_threads)

    @torch.no_grad()
    def work(number):
        ids = DISTINCT[:, number:]
        past = DynamicMaskCache(model)
        pieces = [model(piece, past_key_values=past).logits for piece in ids.split(11, dim=1)]
        return torch.cat([logits_of(model, ids), *pieces], dim=1)

    def together(number):
        barrier.wait()
        return [work(number) for _ in range(3)]

    expected = [work(number) for number in range(number_of_threads)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with concurrent.futures.ThreadPoolExecutor(number_of_threads) as pool:
            found = list(pool.map(together, range(number_of_threads)))
    finally:
        sys.setswitchinterval(interval)
    assert all(torch.equal(one, wanted) for many, wanted in zip(found, expected, strict=True) for one in many)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing(use_reentrant):
    model = converted(**HIDDEN).train()
    logits_of(model).square().sum().backward()
    expected = gradients(model)
    model.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    loss = logits_of(model).square().sum()
    worker = threading.Thread(target=loss.backward)
    worker.start()
    worker.join()
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[name], msg=name)


@pytest.mark.parametrize("temperature", [None, 0.8])
def test_training_compiles_to_one_graph(temperature):
    torch.compiler.reset()
    model = converted(**HIDDEN).train()
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")
    for run in (model, compiled):
        if temperature is None:
            logits_of(run).square().sum().backward()
        else:
            with soft_selection(run, temperature=temperature):
                logits_of(run).square().sum().backward()
    expected = gradients(model)
    for name, gradient in gradients(compiled).items():
        torch.testing.assert_close(gradient, expected[name], msg=name)


@torch.no_grad()
def test_adapters_on_the_projections_change_nothing_before_they_are_trained():
    model = converted(**HIDDEN)
    expected = logits_of(model)
    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], modules_to_save=["dma"], task_type="CAUSAL_LM")
    adapted = get_peft_model(model, lora)
    torch.testing.assert_close(logits_of(adapted), expected)
    past = DynamicMaskCache(adapted.get_base_model())
    found = [adapted(input_ids=piece, past_key_values=past).logits for piece in DISTINCT.split([30, 1, 14], dim=1)]
    torch.testing.assert_close(torch.cat(found, dim=1), expected)
    torch.testing.assert_close(logits_of(adapted.merge_and_unload()), expected)


def test_sharded_parameters(tmp_path):
    from torch.distributed.fsdp import fully_shard

    model = converted(**HIDDEN)
    logits = logits_of(model)
    logits.square().sum().backward()
    expected = gradients(model)
    model.zero_grad()
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = torch.distributed.init_device_mesh("cpu", (1,))
        for layer in [*model.model.layers, model]:
            fully_shard(layer, mesh=mesh)
        sharded = logits_of(model)
        torch.testing.assert_close(sharded, logits)
        sharded.square().sum().backward()
        for name, gradient in gradients(model).items():
            torch.testing.assert_close(gradient.full_tensor(), expected[name], msg=name)
    finally:
        torch.distributed.destroy_process_group()


def load(path, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64, **kwargs).eval()


@torch.no_grad()
@pytest.mark.parametrize("placement", ["plain", "disk"])
def test_it_is_saved_and_loaded(tmp_path, placement):
    model = converted(**HIDDEN)
    model.save_pretrained(tmp_path)
    options = {}
    if placement == "disk":
        parts = ["model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head"]
        places = {**dict.fromkeys(parts, "cpu"), "model.layers.1": "disk"}
        options = {"device_map": places, "offload_folder": tmp_path / "offloaded"}
    again = load(tmp_path, **options)
    assert again.config.flash_dmattn["importance_input"] == "hidden"
    torch.testing.assert_close(logits_of(again), logits_of(model))


@torch.no_grad()
def test_a_copy_has_hooks_of_its_own_and_detaching_takes_them_out():
    model = tiny_model("llama")
    with pytest.raises(ValueError, match="at least"):
        convert_model(model, {**WINDOW, **HIDDEN}, calibration=tokens(1, 200))
    module = model.model.layers[0].self_attn
    assert not module._forward_pre_hooks and not module._forward_hooks
    assert not module._forward_pre_hooks_with_kwargs and not module._forward_hooks_always_called
    model = converted(**HIDDEN)
    twin = copy.deepcopy(model)
    assert torch.equal(logits_of(twin), logits_of(model))
    next(iter_gates(twin))[2].A.add_(1.0)
    assert not torch.equal(logits_of(twin), logits_of(model))


def test_an_older_checkpoint_reads_values():
    section = {key: value for key, value in DynamicMaskConfig().to_dict().items() if key != "importance_input"}
    assert DynamicMaskConfig.from_dict(section).importance_input == "value"


def test_native_doge_is_refused_by_name():
    with dynamic_mask_config(**HIDDEN), pytest.raises(ValueError, match='DogeAttention computes .* must be "value"'):
        build(tiny_config("doge", head_dim=8), attn_implementation="flash_dmattn")(tokens())


def test_a_module_without_hidden_states_is_refused_by_name(monkeypatch):
    model = tiny_model("llama")
    monkeypatch.setattr(type(model.model.layers[0].self_attn), "forward", lambda self, states, **kwargs: None)
    with pytest.raises(ValueError, match='LlamaAttention is not called with hidden_states .* must be "value"'):
        convert_model(model, HIDDEN)


def test_the_importance_alone_trains():
    model = converted(add_importance_bias=False, **HIDDEN)
    with soft_selection(model, temperature=1.0):
        freeze_all_but_importance(model)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
        losses = []
        for _ in range(10):
            loss = model(input_ids=tokens(), labels=tokens(), use_cache=False).loss
            loss.backward()
            losses.append(loss.item())
            optimizer.step()
            optimizer.zero_grad()
    assert losses[-1] < losses[0] - 1e-3
