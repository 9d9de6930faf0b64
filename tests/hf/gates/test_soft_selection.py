"""soft_selection: what the core computes with a temperature, in whole models, as a setting that nothing keeps."""

import copy
import pickle
import threading
import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

import flash_dmattn
from flash_dmattn_hf import DynamicMaskCache, iter_gates, soft_selection
from flash_dmattn_hf.conversion.variants import dense
from flash_dmattn_hf.gates.soft_selection import hard_selection
from flash_dmattn_hf.integration import attention, packed_attention
from flash_dmattn_hf.training import freeze_all_but_importance, parameter_groups

from ..converted import converted
from ..tiny import tiny_model, tokens
from .test_doge import make as make_doge

FROZEN = {"add_importance_bias": False}


def logits_of(model, **inputs):
    return model(**{"input_ids": tokens(), "use_cache": False, **inputs}).logits


def gradients(model):
    found = {name.replace("_orig_mod.", ""): parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    return found


def importance_gradients(model):
    found = [gradient for name, gradient in gradients(model).items() if ".dma." in name or "self_attn.A" in name]
    assert found
    return found


@pytest.mark.parametrize("band", [1.5, None])
@pytest.mark.parametrize("case", ["plain", "padded", "packed"])
def test_the_layers_attend_with_the_temperature(case, band, monkeypatch):
    model = converted()
    inputs = {}
    if case == "padded":
        inputs["attention_mask"] = torch.ones(2, 24, dtype=torch.long).index_fill_(1, torch.arange(5), 0)
    if case == "packed":
        inputs["position_ids"] = torch.cat([torch.arange(10), torch.arange(14)]).repeat(2, 1)
    hard = logits_of(model, **inputs)
    with soft_selection(model, temperature=0.7, band=band):
        soft = logits_of(model, **inputs)

    def attend(*args, **options):
        options = {**options, "selection_temperature": 0.7, "selection_band": band}
        return flash_dmattn.dynamic_mask_attention(*args, **options)

    for module in (attention, packed_attention):
        monkeypatch.setattr(module, "dynamic_mask_attention", attend)
    assert torch.equal(soft, logits_of(model, **inputs))
    assert not torch.allclose(soft, hard, atol=1e-4)


def test_the_hard_mask_is_the_limit_and_comes_back():
    model, distinct = converted(), torch.arange(3, 51).reshape(2, 24)
    hard = logits_of(model, input_ids=distinct)
    with soft_selection(model, temperature=1e-9):
        torch.testing.assert_close(logits_of(model, input_ids=distinct), hard)
    assert torch.equal(logits_of(model, input_ids=distinct), hard)


def test_the_temperature_changes_while_it_is_active_and_blocks_nest():
    model = converted()
    hard = logits_of(model)
    with soft_selection(model, temperature=1.0) as soft:
        warm = logits_of(model)
        soft.temperature = 0.5
        assert soft.temperature == 0.5
        cool = logits_of(model)
        assert not torch.equal(cool, warm)
        with pytest.raises(ZeroDivisionError), soft_selection(model, temperature=1.0):
            assert torch.equal(logits_of(model), warm)
            raise ZeroDivisionError
        assert torch.equal(logits_of(model), cool)
        with pytest.raises(RuntimeError, match="active already"), soft:
            pass
        assert torch.equal(logits_of(model), cool)
    assert torch.equal(logits_of(model), hard)
    with soft:
        assert torch.equal(logits_of(model), cool), "it can be entered again"


@pytest.mark.parametrize("temperature", [0, -1.0, float("nan"), float("inf")])
def test_a_temperature_is_refused(temperature):
    model = converted()
    with pytest.raises(ValueError, match="^temperature must be above 0, got"):
        soft_selection(model, temperature=temperature)
    soft = soft_selection(model, temperature=1.0)
    with pytest.raises(ValueError, match="^temperature must be above 0, got"):
        soft.temperature = temperature
    assert soft.temperature == 1.0


@pytest.mark.parametrize("band", [0.5, float("nan"), float("inf")])
def test_a_band_is_refused(band):
    with pytest.raises(ValueError, match="^band must be None or at least 1, got"):
        soft_selection(converted(), temperature=1.0, band=band)


def test_a_model_without_dynamic_masks_is_refused():
    with pytest.raises(ValueError, match="must have dynamic masks, got LlamaForCausalLM without any"):
        soft_selection(tiny_model("llama"), temperature=1.0).__enter__()
    model = converted()
    with dense(model), pytest.raises(ValueError, match='must use attn_implementation="flash_dmattn", got "sdpa"'):
        soft_selection(model, temperature=1.0).__enter__()


@torch.no_grad()
@pytest.mark.parametrize("use_cache", [True, False])
def test_generation_and_caches_keep_the_hard_mask(use_cache):
    model, prompt = converted(), tokens()
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "use_cache": use_cache}
    expected = model.generate(prompt, **options, output_logits=True, return_dict_in_generate=True)
    cached = model(prompt, past_key_values=DynamicMaskCache(model)).logits
    with soft_selection(model, temperature=5.0):
        found = model.generate(prompt, **options, output_logits=True, return_dict_in_generate=True)
        assert torch.equal(model(prompt, past_key_values=DynamicMaskCache(model)).logits, cached)
        assert not torch.allclose(logits_of(model), cached, atol=1e-4), "a forward without such a cache is soft"
        with hard_selection():
            torch.testing.assert_close(logits_of(model), cached)
    assert torch.equal(torch.stack(found.logits), torch.stack(expected.logits))


def test_nothing_is_saved_or_copied(tmp_path):
    model = converted()
    hard, names = logits_of(model), set(model.state_dict())
    with soft_selection(model, temperature=1.0):
        assert set(model.state_dict()) == names
        model.save_pretrained(tmp_path)
        copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
        for other in [*copies, AutoModelForCausalLM.from_pretrained(tmp_path)]:
            assert torch.equal(logits_of(other.double()), hard)
    assert "temperature" not in (tmp_path / "config.json").read_text()


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointed_layers_are_computed_again_with_the_same_temperature(use_reentrant):
    """In a thread of its own, as autograd has for every GPU."""
    model = converted().train()
    found = []
    for is_checkpointed in (False, True):
        if is_checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
            model.enable_input_require_grads()
        with soft_selection(model, temperature=0.8):
            loss = logits_of(model).square().sum()
            worker = threading.Thread(target=loss.backward)
            worker.start()
            worker.join()
        found.append(gradients(model))
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, msg=name)
    logits_of(model).square().sum().backward()
    assert not torch.allclose(gradients(model)["lm_head.weight"], found[0]["lm_head.weight"])


def test_a_changed_temperature_does_not_compile_again():
    torch.compiler.reset()
    model = converted().train()
    expected = []
    for temperature in (1.0, 0.5, 0.1):
        with soft_selection(model, temperature=temperature):
            expected.append(logits_of(model))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with soft_selection(compiled, temperature=9.0) as soft:
        logits_of(compiled)
        with torch.compiler.set_stance("fail_on_recompile"):
            for temperature, logits in zip((1.0, 0.5, 0.1), expected, strict=True):
                soft.temperature = temperature
                torch.testing.assert_close(logits_of(compiled), logits)
    torch.testing.assert_close(logits_of(compiled), logits_of(model))


def test_threads_that_enter_and_leave_in_any_order_leave_the_hard_mask():
    model = converted(**FROZEN)
    hard = logits_of(model)
    first, second = soft_selection(model, temperature=1.0), soft_selection(model, temperature=0.5)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert all(parameter.requires_grad for _, _, gate in iter_gates(model) for parameter in gate.parameters())
    with soft_selection(model, temperature=0.5):
        expected = logits_of(model)
    assert torch.equal(logits_of(model), expected) and not torch.equal(expected, hard)
    second.__exit__(None, None, None)
    assert torch.equal(logits_of(model), hard)
    assert not any(parameter.requires_grad for _, _, gate in iter_gates(model) for parameter in gate.parameters())


@pytest.mark.parametrize("kind", ["llama", "query heads", "doge"])
def test_an_importance_without_bias_trains(kind):
    heads = {"importance_heads": "query"} if kind == "query heads" else {}
    if kind == "doge":
        model = make_doge(dtype=torch.float64)
        for _, _, gate in iter_gates(model):
            gate.config = gate.config.updated(FROZEN)
    else:
        model = converted(**FROZEN, **heads)
    with soft_selection(model, temperature=1.0):
        assert freeze_all_but_importance(model) > 0
        (group,) = parameter_groups(model, learning_rate=0.0, importance_learning_rate=0.02)
        optimizer = torch.optim.AdamW([group])
        losses = []
        for _ in range(12):
            loss = model(input_ids=tokens(), labels=tokens(), use_cache=False).loss
            loss.backward()
            if not losses:
                assert all(parameter.grad.abs().max() > 0 for parameter in group["params"])
            losses.append(loss.item())
            optimizer.step()
            optimizer.zero_grad()
    assert losses[-1] < losses[0] - 1e-3


def test_what_was_frozen_for_lack_of_a_gradient_is_frozen_again():
    model = converted(**FROZEN)
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert not all(before.values())
    with pytest.raises(ZeroDivisionError), soft_selection(model, temperature=1.0):
        assert all(parameter.requires_grad for parameter in model.parameters())
        raise ZeroDivisionError
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == before


def test_what_the_user_froze_stays_frozen():
    model = converted().requires_grad_(False)
    with soft_selection(model, temperature=1.0):
        assert not any(parameter.requires_grad for parameter in model.parameters())


def test_an_optimizer_that_came_too_early_is_noticed():
    model = converted(**FROZEN)
    with pytest.warns(UserWarning, match="the importance is frozen, so it is in no parameter group"):
        groups = parameter_groups(model, learning_rate=1e-3, importance_learning_rate=1e-2)
    optimizer = torch.optim.AdamW(groups)
    with pytest.warns(UserWarning, match="nothing has changed it"), soft_selection(model, temperature=1.0):
        logits_of(model).sum().backward()
        optimizer.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with soft_selection(model, temperature=1.0):
            optimizer = torch.optim.AdamW(parameter_groups(model, learning_rate=1e-3, importance_learning_rate=1e-2))
            logits_of(model).sum().backward()
            optimizer.step()
        with soft_selection(model, temperature=1.0), torch.no_grad():
            logits_of(model)


@pytest.mark.parametrize("values", [{}, FROZEN], ids=["bias", "no bias"])
def test_adapters_with_a_copy_of_the_importance(values):
    model = converted(**values)
    hard = logits_of(model)
    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], modules_to_save=["dma"], task_type="CAUSAL_LM")
    model = get_peft_model(model, lora)
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    with soft_selection(model, temperature=1.0):
        assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == before
        logits = logits_of(model)
        assert not torch.allclose(logits, hard, atol=1e-4)
        logits.square().sum().backward()
        for name, gradient in gradients(model).items():
            if "dma" in name:
                assert (gradient is not None and gradient.abs().max() > 0) == ("modules_to_save" in name), name
        with model.disable_adapter():
            assert torch.equal(logits_of(model), logits)
    torch.testing.assert_close(logits_of(model), hard)


@pytest.fixture
def one_process(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_data_parallel_models(one_process):
    wrap = torch.nn.parallel.DistributedDataParallel
    model = converted()
    with soft_selection(wrap(model), temperature=1.0):
        soft = logits_of(model)
    assert not torch.allclose(soft, logits_of(model), atol=1e-4)
    model = converted(**FROZEN)
    late = wrap(model)
    with pytest.raises(ValueError, match="enter soft_selection before the model is wrapped for several processes"):
        soft_selection(late, temperature=1.0).__enter__()
    assert not any(gate.soft_selections or gate.A.requires_grad for _, _, gate in iter_gates(model))
    with soft_selection(model, temperature=1.0), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*stride.*")
        logits_of(wrap(model)).square().sum().backward()
        assert all(gradient.abs().max() > 0 for gradient in importance_gradients(model))
        with torch.no_grad():
            next(iter_gates(model))[2].A.add_(1.0)
