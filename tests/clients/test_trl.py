"""TRL: the losses of SFT, DPO, KTO and GRPO are those of sdpa."""

import math
import warnings

import pytest
from transformers import AutoModelForCausalLM

from .conftest import CHOICES, load_frozen, text

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

COMMON = {
    "max_steps": 2,
    "per_device_train_batch_size": 2,
    "logging_steps": 1,
    "report_to": [],
    "use_cpu": True,
    "bf16": False,
    "disable_tqdm": True,
    "save_strategy": "no",
    "learning_rate": 1e-2,
    "seed": 3,
}


def train(trainer):
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    return [float(entry["loss"]) for entry in logs], logs


@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
def test_sft(dense, tokenizer, tmp_path, packing):
    rows = datasets.Dataset.from_list([{"text": text(7 * i, 10 + 5 * i)} for i in range(8)])
    losses = {}
    for name in CHOICES:
        args = trl.SFTConfig(str(tmp_path / name), packing=packing, max_length=60, **COMMON)
        trainer = trl.SFTTrainer(load_frozen(dense, name), args=args, train_dataset=rows, processing_class=tokenizer)
        losses[name], _ = train(trainer)
    assert losses["flash_dmattn"] == pytest.approx(losses["sdpa"], abs=1e-4)


def preferences():
    rows = [
        {"prompt": text(i, 10), "chosen": " " + text(i + 5, 20), "rejected": " " + text(i + 20, 26)} for i in range(4)
    ]
    return datasets.Dataset.from_list(rows)


def dpo(dense, tokenizer, tmp_path, name, **options):
    args = trl.DPOConfig(str(tmp_path / name), **COMMON, **options)
    return trl.DPOTrainer(load_frozen(dense, name), args=args, train_dataset=preferences(), processing_class=tokenizer)


def test_dpo(dense, tokenizer, tmp_path):
    losses = {}
    for name, choice in CHOICES.items():
        losses[name], _ = train(dpo(dense, tokenizer, tmp_path, name, model_init_kwargs=choice))
    assert losses["sdpa"][0] == pytest.approx(math.log(2), abs=1e-3)
    assert losses["flash_dmattn"] == pytest.approx(losses["sdpa"], abs=1e-4)


def test_a_reference_of_dpo_without_the_settings_warns_what_to_write(dense, tokenizer, tmp_path):
    with pytest.warns(UserWarning, match="model_init_kwargs=.*'keep_window_size': 64"):
        dpo(dense, tokenizer, tmp_path, "flash_dmattn")


def test_a_reference_of_dpo_beyond_the_window(dense, tokenizer, tmp_path):
    choice = {**CHOICES["flash_dmattn"], "flash_dmattn": {"keep_window_size": 16}}
    model = AutoModelForCausalLM.from_pretrained(dense, **choice)
    args = trl.DPOConfig(str(tmp_path), model_init_kwargs=choice, **COMMON)
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        trainer = trl.DPOTrainer(model, args=args, train_dataset=preferences(), processing_class=tokenizer)
    assert not [entry for entry in record if "is in use with" in str(entry.message)]
    assert train(trainer)[0][0] == pytest.approx(math.log(2), abs=1e-3)


def test_kto(dense, tokenizer, tmp_path):
    rows = [{"prompt": text(i, 10), "completion": " " + text(3 * i, 20), "label": i % 2 == 0} for i in range(4)]
    losses = {}
    for name, choice in CHOICES.items():
        args = trl.KTOConfig(str(tmp_path / name), model_init_kwargs=choice, **COMMON)
        data = datasets.Dataset.from_list(rows)
        trainer = trl.KTOTrainer(load_frozen(dense, name), args=args, train_dataset=data, processing_class=tokenizer)
        losses[name], _ = train(trainer)
    assert losses["flash_dmattn"] == pytest.approx(losses["sdpa"], abs=1e-4)


def test_grpo(dense, tokenizer, tmp_path):
    rows = datasets.Dataset.from_list([{"prompt": text(i, 10)} for i in range(4)])
    results = {}
    for name, choice in CHOICES.items():
        args = trl.GRPOConfig(
            str(tmp_path / name),
            model_init_kwargs=choice,
            num_generations=2,
            max_completion_length=12,
            beta=0.1,
            **COMMON,
        )
        trainer = trl.GRPOTrainer(
            load_frozen(dense, name),
            reward_funcs=lambda completions, **_: [float(len(set(c.split()))) for c in completions],
            args=args,
            train_dataset=rows,
            processing_class=tokenizer,
        )
        losses, logs = train(trainer)
        results[name] = [*losses, *(float(entry["reward"]) for entry in logs), *(float(e["kl"]) for e in logs)]
    assert results["flash_dmattn"] == pytest.approx(results["sdpa"], abs=1e-4)
