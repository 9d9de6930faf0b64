"""The importance in training: its own learning rate, alone, under LoRA, and what the log says about it."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, DogeConfig, DogeForCausalLM, TrainerCallback

import flash_dmattn_hf  # noqa: F401
from flash_dmattn_hf.training.importance import (
    ImportanceCallback,
    freeze_all_but_importance,
    importance_parameters,
    parameter_groups,
    probe,
)

from .trainer_setup import VOCABULARY, WINDOW, importance_of, losses, make_config, make_model, make_trainer


def make_doge() -> DogeForCausalLM:
    torch.manual_seed(0)
    return DogeForCausalLM(
        DogeConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            keep_window_size=8,
            max_position_embeddings=64,
            attn_implementation="flash_dmattn",
        )
    )


MODELS = {"attached gates": make_model, "native Doge": make_doge}
IMPORTANCE_NAMES = {
    "attached gates": {"dma.A", "dma.dt_proj.weight"},
    "native Doge": {"A", "dt_proj.weight"},
}


@pytest.mark.parametrize("kind", MODELS)
def test_the_importance_parameters_are(kind):
    model = MODELS[kind]()
    names = [name for name, _ in importance_parameters(model)]
    prefixes = [f"model.layers.{i}.self_attn." for i in range(2)]
    assert set(names) == {prefix + name for prefix in prefixes for name in IMPORTANCE_NAMES[kind]}
    parameters = dict(model.named_parameters())
    assert all(parameters[name] is parameter for name, parameter in importance_parameters(model))


@pytest.mark.parametrize("kind", MODELS)
def test_the_groups_hold_every_parameter_once(kind):
    model = MODELS[kind]()
    groups = parameter_groups(model, learning_rate=1e-3, importance_learning_rate=1e-2, weight_decay=0.1)
    grouped = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(grouped) == sorted(map(id, model.parameters()))
    rates = {group["name"]: (group["lr"], group["weight_decay"]) for group in groups}
    assert rates == {"decayed": (1e-3, 0.1), "not decayed": (1e-3, 0.0), "importance": (1e-2, 0.0)}


def test_the_groups_leave_out_what_is_frozen():
    model = make_model()
    freeze_all_but_importance(model)
    (group,) = parameter_groups(model, learning_rate=1e-3, importance_learning_rate=1e-2)
    assert group["name"] == "importance"


@pytest.mark.parametrize("name", ["learning_rate", "importance_learning_rate"])
@pytest.mark.parametrize("rate", [-1e-3, float("nan")])
def test_a_learning_rate_is_refused(name, rate):
    rates = {"learning_rate": 1e-3, "importance_learning_rate": 1e-3, name: rate}
    with pytest.raises(ValueError, match=f"^{name} must be at least 0, got"):
        parameter_groups(make_model(), **rates)


def test_nothing_to_train_is_refused():
    with pytest.raises(ValueError, match="require a gradient"):
        parameter_groups(make_model().requires_grad_(False), learning_rate=1.0, importance_learning_rate=1.0)


@pytest.mark.parametrize("function", [freeze_all_but_importance, lambda model: list(importance_parameters(model))])
def test_a_model_without_gates_is_refused(function):
    config = make_config()
    config._attn_implementation = "sdpa"
    dense = AutoModelForCausalLM.from_config(config)
    with pytest.raises(ValueError, match="model must have dynamic masks, got LlamaForCausalLM without any"):
        function(dense)
    assert all(parameter.requires_grad for parameter in dense.parameters())


@pytest.mark.parametrize("kind", MODELS)
def test_freezing_leaves_only_the_importance(kind):
    model = MODELS[kind]()
    count = freeze_all_but_importance(model)
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert names == {name for name, _ in importance_parameters(model)}
    assert count == sum(parameter.numel() for _, parameter in importance_parameters(model))


def test_importance_alone_is_refused_without_its_bias():
    model = make_model(add_importance_bias=False)
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match="add_importance_bias must be True .* got False at model.layers.0.self_attn"):
        freeze_all_but_importance(model)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before


@pytest.mark.parametrize("batches", ["padded", "packed"])
@pytest.mark.parametrize("kind", MODELS)
def test_importance_alone_lowers_the_loss(tmp_path, kind, batches):
    model = MODELS[kind]()
    freeze_all_but_importance(model)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    trainer = make_trainer(model, tmp_path, batches=batches, importance_learning_rate=0.1, max_steps=20)
    trainer.train()
    history = losses(trainer)
    assert sum(history[-4:]) < sum(history[:4]) - 1e-3
    trained = {name for name, _ in importance_parameters(model)}
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == (name not in trained), name


@pytest.mark.parametrize("as_class", [False, True], ids=["optimizer given", "optimizer class given"])
def test_the_scheduler_scales_both_learning_rates(tmp_path, as_class):
    model = make_model()
    trainer = make_trainer(model, tmp_path, importance_learning_rate=0.5, as_class=as_class, max_steps=4)
    rates = []
    trainer.add_callback(_recorder(rates))
    trainer.train()
    others, importance = zip(*rates, strict=True)
    assert others == pytest.approx([1e-2, 7.5e-3, 5e-3, 2.5e-3])
    assert importance == pytest.approx([0.5, 0.375, 0.25, 0.125])


def _recorder(rates):
    class Recorder(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
            groups = {group["name"]: group["lr"] for group in optimizer.param_groups}
            rates.append((groups["decayed"], groups["importance"]))

    return Recorder()


@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bf16 autocast"])
@pytest.mark.parametrize("kind", MODELS)
def test_the_log_says_what_the_importance_does(tmp_path, kind, bf16):
    model = MODELS[kind]()
    trainer = make_trainer(model, tmp_path, importance_learning_rate=0.1, callbacks=[ImportanceCallback()], bf16=bf16)
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    length, window = 7, WINDOW["keep_window_size"]
    first, last = entries[0], entries[-1]
    assert first["dma/visible_keys"] == pytest.approx(sum(min(t + 1, window) for t in range(length)) / length)
    assert first["dma/visible_fraction"] == 1.0
    A = torch.cat([parameter for name, parameter in importance_parameters(model) if name.endswith("A")])
    A_at_start = torch.cat([p for name, p in importance_parameters(MODELS[kind]()) if name.endswith("A")])
    assert last["dma/A_norm"] == pytest.approx(A.norm().item())
    assert last["dma/A_moved"] == pytest.approx((A - A_at_start).norm().item())
    assert first["dma/importance_moved"] > 0 and last["dma/importance_spread"] > 0
    assert last["dma/learning_rate"] == 0.0
    assert "dma/A_norm" not in trainer.state.log_history[-1]  # the summary of the run


def test_visible_keys_beyond_the_window(tmp_path):
    tokens, window = torch.arange(3, 43), WINDOW["keep_window_size"]
    callback = ImportanceCallback(tokens)
    make_trainer(make_model(), tmp_path, callbacks=[callback], max_steps=1).train()
    metrics = callback.measure(make_model())
    seen = [min(t + 1, window) for t in range(40)]
    assert metrics["dma/visible_keys"] == pytest.approx(sum(seen) / 40)
    assert metrics["dma/visible_fraction"] == pytest.approx(sum(seen) / sum(range(1, 41)))
    assert metrics["dma/changed_fraction"] == 0.0
    assert callback.measure(make_model(spread=3.0))["dma/changed_fraction"] > 0.01


@pytest.mark.parametrize("kind", MODELS)
def test_the_probe_sees_what_the_model_does(kind):
    model = MODELS[kind]().train()
    tokens = torch.arange(3, 43)
    expected = model.eval()(input_ids=tokens[None], use_cache=False).logits
    model.train()
    seen = probe(model, tokens)
    assert model.training and [x.shape for x in seen.importance] == [(2, 40)] * 2
    assert torch.equal(model.eval()(input_ids=tokens[None], use_cache=False).logits, expected)
    for birth, death in seen.visibility:
        rows = torch.arange(40)[:, None, None]
        visible = ((birth <= rows) & (rows < death)).sum(-1)
        assert torch.equal(visible, torch.arange(1, 41).clamp(max=8)[:, None].expand(-1, 2))


def test_the_callback_changes_no_training(tmp_path):
    def run(folder, callbacks):
        model = make_model()
        make_trainer(model, folder, callbacks=callbacks, max_steps=4).train()
        return model.state_dict()

    with_it, without = run(tmp_path / "a", [ImportanceCallback()]), run(tmp_path / "b", None)
    assert all(torch.equal(with_it[name], without[name]) for name in without)


def test_the_callback_needs_a_probe_for_a_stream(tmp_path):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            yield {"input_ids": [3, 4, 5], "labels": [3, 4, 5]}

    trainer = make_trainer(make_model(), tmp_path, callbacks=[ImportanceCallback()], max_steps=1)
    trainer.train_dataset = Stream()
    with pytest.raises(ValueError, match="probe_input_ids must be given .* got None for Stream"):
        trainer.train()


@pytest.fixture(params=["all-linear", ["q_proj", "v_proj"]], ids=["all-linear", "q and v"])
def adapted(request, tmp_path):
    """A model with LoRA adapters and trained importance, its base checkpoint, and the adapter's folder."""
    base = make_model(spread=0.3)
    base.save_pretrained(tmp_path / "base")
    lora = LoraConfig(r=4, target_modules=request.param, modules_to_save=["dma"], task_type="CAUSAL_LM")
    model = get_peft_model(base, lora)
    trainer = make_trainer(model, tmp_path / "run", importance_learning_rate=0.1, max_steps=6)
    before = importance_of(model)
    trainer.train()
    trainer.save_model(tmp_path / "adapter")
    return model.eval(), before, tmp_path


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(input_ids=torch.arange(3, 43)[None], use_cache=False).logits


def test_lora_trains_the_saved_importance_only(adapted):
    model, before, _ = adapted
    after = importance_of(model)
    assert not any("lora" in name for name in after)
    for name in after:
        assert torch.equal(after[name], before[name]) == ("original_module" in name), name


def test_lora_reloads_with_equal_logits(adapted):
    model, _, folder = adapted
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    assert not torch.allclose(logits(base.eval()), logits(model), atol=1e-4)
    assert torch.equal(logits(PeftModel.from_pretrained(base, folder / "adapter").eval()), logits(model))


def test_lora_merges_into_an_ordinary_checkpoint(adapted):
    model, _, folder = adapted
    expected = logits(model)
    model.merge_and_unload().save_pretrained(folder / "merged")
    merged, info = AutoModelForCausalLM.from_pretrained(folder / "merged", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    torch.testing.assert_close(logits(merged.eval()), expected, atol=1e-5, rtol=1e-5)
