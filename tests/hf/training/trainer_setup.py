"""A tiny model, texts that can be learned by heart, and a Trainer as every user would make it."""

from pathlib import Path

import torch
from transformers import (
    DataCollatorWithFlattening,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
    set_seed,
)

from flash_dmattn_hf import dynamic_mask_config, iter_gates
from flash_dmattn_hf.training.importance import parameter_groups

VOCABULARY = 48
WINDOW = {"keep_window_size": 8, "num_sink_tokens": 1, "local_window_size": 3}


def make_config(**values) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        attn_implementation="flash_dmattn",
        **values,
    )


def make_model(seed: int = 0, *, spread: float = 0.0, **attention) -> LlamaForCausalLM:
    """A random model; with `spread` > 0 its importance differs between keys, so that the selection matters."""
    set_seed(seed)
    with dynamic_mask_config(**{**WINDOW, **attention}):
        model = LlamaForCausalLM(make_config())
    if spread:
        with torch.no_grad():
            for _, _, gate in iter_gates(model):
                gate.A.normal_(0, spread)
                gate.dt_proj.weight.normal_(0, 1)
    return model


def make_examples(count: int = 8, seed: int = 1) -> list[dict[str, list[int]]]:
    """Token sequences of different lengths, most of them longer than the window."""
    generator = torch.Generator().manual_seed(seed)
    examples = []
    for i in range(count):
        input_ids = torch.randint(3, VOCABULARY, (7 + 5 * (i % 4),), generator=generator).tolist()
        examples.append({"input_ids": input_ids, "labels": input_ids})
    return examples


def pad(features: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """The usual right-padded batch."""
    length = max(len(feature["input_ids"]) for feature in features)
    rows = {"input_ids": 0, "attention_mask": 0, "labels": -100}
    batch = {name: [] for name in rows}
    for feature in features:
        full = {**feature, "attention_mask": [1] * len(feature["input_ids"])}
        for name, filler in rows.items():
            batch[name].append(full[name] + [filler] * (length - len(full[name])))
    return {name: torch.tensor(values) for name, values in batch.items()}


COLLATORS = {
    "padded": pad,
    "packed": DataCollatorWithFlattening(),
    "packed with cu_seqlens": DataCollatorWithFlattening(return_flash_attn_kwargs=True),
}


def make_trainer(
    model,
    folder: Path,
    *,
    batches="padded",
    importance_learning_rate=None,
    as_class=False,
    callbacks=None,
    **options,
) -> Trainer:
    """An unmodified Trainer on `make_examples()`; `options` are TrainingArguments.

    as_class: hand over the optimizer's class and the groups rather than the optimizer.
    """
    values = {
        "output_dir": str(folder),
        "max_steps": 8,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "linear",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        **options,
    }
    args = TrainingArguments(**values)
    optimizer = {}
    if importance_learning_rate is not None:
        groups = parameter_groups(
            model, learning_rate=args.learning_rate, importance_learning_rate=importance_learning_rate
        )
        if as_class:
            optimizer = {"optimizer_cls_and_kwargs": (torch.optim.AdamW, {"params": groups})}
        else:
            optimizer = {"optimizers": (torch.optim.AdamW(groups), None)}
    return Trainer(
        model,
        args,
        data_collator=COLLATORS[batches],
        train_dataset=make_examples(),
        callbacks=callbacks,
        **optimizer,
    )


def losses(trainer: Trainer) -> list[float]:
    return [float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]


def importance_of(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if ".dma." in name}
