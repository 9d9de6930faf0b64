"""Fine-tunes a checkpoint with dynamic masks on text files, with an unmodified Trainer.

    python scripts/train.py configs/full.yaml model=out/model train_files='["corpus/**/*.txt"]'
    python scripts/train.py configs/importance_only.yaml model=out/model train_files='["book.txt"]'
    python scripts/train.py configs/long_context.yaml model=out/model train_files='["books/*.txt"]'
    python scripts/train.py ... --resume

configs/context_parallel.yaml is for several GPUs that share a sequence: docs/scaling.md has the command.

A configuration file holds the fields of `TrainConfig`; arguments of the form key=value replace them, with dots for
nested ones. Loss on eval_files is measured before and after, with FSDP2 only after. The trained model, its
metrics and the log history end in output_dir.
"""

import argparse
import glob
import json
import sys
from contextlib import nullcontext
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    DataCollatorWithFlattening,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

from flash_dmattn_hf import dynamic_mask_config
from flash_dmattn_hf.training.importance import ImportanceCallback, freeze_all_but_importance, parameter_groups
from flash_dmattn_hf.training.loss import use_chunked_loss


@dataclass(frozen=True)
class TrainConfig:
    """What to train, on what, and how.

    model: directory or Hub name of a causal LM, converted or plain. output_dir: where checkpoints and result go.
    train_files, eval_files: text files or patterns such as "corpus/**/*.txt"; every file is one document.
    sequence_length: documents are cut into pieces of at most so many tokens.
    batches: "packed" (pieces of a batch one after the other, no padding), "padded", or "rows" (all pieces one after the
        other, cut into rows of exactly sequence_length tokens, as several processes need them that share a sequence).
    importance_only: freeze everything but the importance.
    importance_learning_rate: of A and dt_proj; training.learning_rate is that of the rest.
    chunked_loss: compute the loss without ever holding the logits of all tokens, which long sequences need.
    dtype: dtype of the weights. attention: fields of DynamicMaskConfig that replace the checkpoint's.
    training: fields of transformers.TrainingArguments.

    Raises ValueError for values outside of these.
    """

    model: str
    output_dir: str
    train_files: list[str]
    eval_files: list[str] = field(default_factory=list)
    sequence_length: int = 2048
    batches: str = "packed"
    importance_only: bool = False
    importance_learning_rate: float = 1e-3
    chunked_loss: bool = False
    dtype: str = "float32"
    attention: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("model", "output_dir"):
            if not isinstance(getattr(self, name), str) or not getattr(self, name):
                raise ValueError(f"{name} must be a path or name, got {getattr(self, name)!r}")
        for name in ("train_files", "eval_files"):
            files = getattr(self, name)
            if not isinstance(files, list) or not all(isinstance(file, str) for file in files):
                raise ValueError(f"{name} must be a list of files or patterns, got {files!r}")
        for name in ("attention", "training"):
            if not isinstance(getattr(self, name), dict):
                raise ValueError(f"{name} must be a mapping, got {getattr(self, name)!r}")
        if type(self.sequence_length) is not int or self.sequence_length < 2:
            raise ValueError(f"sequence_length must be an integer of at least 2, got {self.sequence_length!r}")
        if self.batches not in ("packed", "padded", "rows"):
            raise ValueError(f"batches must be packed, padded or rows, got {self.batches!r}")
        for name in ("importance_only", "chunked_loss"):
            if type(getattr(self, name)) is not bool:
                raise ValueError(f"{name} must be true or false, got {getattr(self, name)!r}")
        if self.chunked_loss and self.training.get("label_smoothing_factor"):
            raise ValueError("training.label_smoothing_factor must be 0 with chunked_loss: it needs the logits")
        rate = self.importance_learning_rate
        if isinstance(rate, bool) or not isinstance(rate, int | float) or rate < 0:
            raise ValueError(f"importance_learning_rate must be a number of at least 0, got {rate!r}")
        if self.dtype not in ("float32", "bfloat16", "float16"):
            raise ValueError(f"dtype must be float32, bfloat16 or float16, got {self.dtype!r}")
        refuse_unknown("training", self.training, TrainingArguments)


def refuse_unknown(where: str, values: dict[str, Any], owner: type) -> None:
    """Raises ValueError naming the keys of `values` that are no fields of the dataclass `owner`."""
    known = {field.name for field in fields(owner) if field.init}
    if unknown := sorted(set(map(str, values)) - known):
        raise ValueError(f"{where} must only have fields of {owner.__name__}, got {unknown}")


def read_config(path: str, overrides: list[str]) -> TrainConfig:
    """Reads a YAML file and applies `key=value` overrides, whose values are YAML too."""
    values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold a mapping, got {type(values).__name__}")
    for override in overrides:
        name, equals, text = override.partition("=")
        if not equals:
            raise ValueError(f"an override must look like key=value, got {override!r}")
        *sections, key = name.split(".")
        section = values
        for part in sections:
            section = section.setdefault(part, {})
            if not isinstance(section, dict):
                raise ValueError(f"{part} must be a mapping to set {name}, got {section!r}")
        section[key] = yaml.safe_load(text)
    values = _as_meant(values)
    refuse_unknown(path, values, TrainConfig)
    missing = [name for name in ("model", "output_dir", "train_files") if name not in values]
    if missing:
        raise ValueError(f"{path} must have {missing[0]}: add it, or pass {missing[0]}=VALUE")
    return TrainConfig(**values)


def _as_meant(value: Any, name: str = "") -> Any:
    """YAML reads 1e-3 as a string and `save_strategy: no` as False; here they are a number and "no"."""
    if isinstance(value, dict):
        return {key: _as_meant(item, key) for key, item in value.items()}
    if value is False and name.endswith("_strategy"):
        return "no"
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def read_pieces(
    tokenizer: PreTrainedTokenizerBase, patterns: list[str], sequence_length: int
) -> list[dict[str, list[int]]]:
    """Tokenizes every file that matches, in sorted order, into pieces of at most `sequence_length` tokens.

    A document ends with the tokenizer's end-of-text token. Raises ValueError for a pattern without a match or
    when nothing is left to train on.
    """
    files = []
    for pattern in patterns:
        found = sorted(path for path in glob.glob(pattern, recursive=True) if Path(path).is_file())
        if not found:
            raise ValueError(f"text files must exist, got {pattern!r}, which matches none")
        files += found
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    pieces = []
    for file in files:
        text = Path(file).read_text(encoding="utf-8", errors="replace")
        input_ids = tokenizer(text, verbose=False)["input_ids"] + end
        for start in range(0, len(input_ids), sequence_length):
            piece = input_ids[start : start + sequence_length]
            if len(piece) >= 2:
                pieces.append({"input_ids": piece, "attention_mask": [1] * len(piece), "labels": list(piece)})
    if not pieces:
        raise ValueError(f"text files must hold at least two tokens, got none in {patterns}")
    return pieces


def as_rows(pieces: list[dict[str, list[int]]], length: int) -> list[dict[str, list[int]]]:
    """Returns pieces one after the other, cut into rows of `length` tokens; position_ids say where a piece begins.

    Nothing is predicted across the border of two pieces. Raises ValueError if there is no whole row.
    """
    whole = {
        "input_ids": [token for piece in pieces for token in piece["input_ids"]],
        "labels": [label for piece in pieces for label in [-100, *piece["labels"][1:]]],
        "position_ids": [position for piece in pieces for position in range(len(piece["input_ids"]))],
    }
    starts = range(0, len(whole["input_ids"]) - length + 1, length)
    if not starts:
        raise ValueError(f"text files must hold a row of {length} tokens, got {len(whole['input_ids'])} tokens")
    return [{name: values[start : start + length] for name, values in whole.items()} for start in starts]


def load_model(config: TrainConfig) -> PreTrainedModel:
    """Loads the checkpoint with dynamic masks, in config.dtype, frozen but for the importance if asked."""
    with dynamic_mask_config(**config.attention) if config.attention else nullcontext():
        model = AutoModelForCausalLM.from_pretrained(
            config.model, dtype=getattr(torch, config.dtype), attn_implementation="flash_dmattn"
        )
    if config.importance_only:
        count = freeze_all_but_importance(model)
        print(f"training {count} numbers of importance out of {model.num_parameters()}")
    return model


def make_trainer(config: TrainConfig, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Trainer:
    """Puts model, texts, optimizer and callback together; the Trainer itself is transformers' own."""
    args = TrainingArguments(output_dir=config.output_dir, **config.training)
    if config.batches == "packed":
        collator = DataCollatorWithFlattening()
    elif config.batches == "rows":
        collator = default_data_collator
    else:
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        collator = DataCollatorForSeq2Seq(tokenizer)
    groups = parameter_groups(
        model,
        learning_rate=args.learning_rate,
        importance_learning_rate=config.importance_learning_rate,
        weight_decay=args.weight_decay,
    )
    optimizer = {
        "params": groups,
        "lr": args.learning_rate,
        "betas": (args.adam_beta1, args.adam_beta2),
        "eps": args.adam_epsilon,
    }
    pieces = {
        name: read_pieces(tokenizer, patterns, config.sequence_length) if patterns else None
        for name, patterns in (("train", config.train_files), ("eval", config.eval_files))
    }
    if config.batches == "rows":
        pieces = {name: found and as_rows(found, config.sequence_length) for name, found in pieces.items()}
    return Trainer(
        model,
        args,
        data_collator=collator,
        train_dataset=pieces["train"],
        eval_dataset=pieces["eval"],
        processing_class=tokenizer,
        optimizer_cls_and_kwargs=(torch.optim.AdamW, optimizer),
        callbacks=[ImportanceCallback()],
    )


def train(config: TrainConfig, *, resume: bool = False) -> dict[str, float]:
    """Trains, saves, prints and returns the metrics: eval_loss_before and eval_loss_after where there is an eval text.

    With FSDP2 there is no eval_loss_before. Every process returns its own train_loss; that of the first is kept.
    """
    output = Path(config.output_dir)
    if not resume and output.exists() and any(output.iterdir()):
        raise ValueError(f"output_dir must be empty or new, got {output}; --resume goes on with a run in it")
    set_seed(config.training.get("seed", 42))
    tokenizer = AutoTokenizer.from_pretrained(config.model)
    model = load_model(config)
    use_cache = model.config.use_cache
    trainer = make_trainer(config, model, tokenizer)
    is_first, metrics = trainer.is_world_process_zero(), {}
    with use_chunked_loss(model) if config.chunked_loss else nullcontext():
        if trainer.eval_dataset is not None and not resume and trainer.accelerator.is_fsdp2:
            if is_first:
                print(
                    "the loss before training is not measured with FSDP2, which shards a model only with its optimizer"
                )
        elif trainer.eval_dataset is not None and not resume:
            metrics["eval_loss_before"] = trainer.evaluate()["eval_loss"]
        metrics |= trainer.train(resume_from_checkpoint=resume or None).metrics
        if trainer.eval_dataset is not None:
            metrics["eval_loss_after"] = trainer.evaluate()["eval_loss"]
    model.config.use_cache = use_cache  # the Trainer switches it off
    trainer.save_model()
    trainer.save_state()
    if is_first:
        text = json.dumps(metrics, indent=2)
        (output / "metrics.json").write_text(text + "\n")
        print(text)
    return metrics


def main(argv: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="YAML file, for example configs/full.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in output_dir")
    arguments = parser.parse_args(argv)
    return train(read_config(arguments.config, arguments.overrides), resume=arguments.resume)


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"error: {error}")
