"""`flash-dmattn distill`: a dense checkpoint in, one out whose importance has learned what to keep."""

import argparse
import shutil
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from transformers import AutoConfig, PreTrainedModel

from flash_dmattn_hf.cli import common
from flash_dmattn_hf.cli.distill_data import hold_out, read_data
from flash_dmattn_hf.cli.distill_options import add_options, read_recipe
from flash_dmattn_hf.cli.distill_progress import DistillProgress
from flash_dmattn_hf.cli.distill_results import Results
from flash_dmattn_hf.cli.provenance import provenance
from flash_dmattn_hf.conversion.atomic_directory import atomic_directory, check_destination
from flash_dmattn_hf.conversion.calibration import Calibration
from flash_dmattn_hf.conversion.checkpoint import Source, find_source
from flash_dmattn_hf.conversion.convert import convert_model
from flash_dmattn_hf.conversion.importance_file import load_importance, save_importance
from flash_dmattn_hf.evaluation.prompts import Prompt, leading_tokens, recall_prompts
from flash_dmattn_hf.evaluation.tasks import TASKS
from flash_dmattn_hf.training.held_out import HeldOut
from flash_dmattn_hf.training.planted_facts import random_values
from flash_dmattn_hf.training.recipe import Recipe
from flash_dmattn_hf.training.stages import check_packages, train_stage
from flash_dmattn_hf.training.teacher import cast_parameters

DESCRIPTION = """\
Converts a dense causal language model to dynamic masks, calibrates the importance, and trains it to predict what the
dense model predicts: first the importance alone, then all weights or an adapter. Writes an ordinary checkpoint, with
the figures of the model before and after each stage in OUT/distillation. docs/distillation.md explains them.
"""
DEPTHS = (10, 30, 50, 70, 90)
IMPORTANCE = "importance"
"""Directory in OUT with the importance as files of its own, where the backbone is that of MODEL."""
UNFINISHED = ".unfinished"
"""What is appended to OUT for the directory of a run that is not over."""


def add_parser(commands, shared: argparse.ArgumentParser) -> None:
    """Adds the command to the command line."""
    parser = commands.add_parser(
        "distill", parents=[shared], help="convert a dense checkpoint and train it", description=DESCRIPTION
    )
    parser.set_defaults(run=run)
    parser.add_argument("model", metavar="MODEL", help="a directory, a .gguf file or a Hub id")
    parser.add_argument("out", metavar="OUT", type=Path, help="directory to write; it appears when it is complete")
    parser.add_argument("--overwrite", action="store_true", help="replace the checkpoint at OUT")
    add_options(parser)
    common.add_model_options(parser.add_argument_group("model"), dtype=False)


def run(args: argparse.Namespace) -> None:
    """Trains, prints the table and writes OUT. All input is checked before a model is loaded."""
    recipe = read_recipe(args)
    check_packages(recipe)
    out = args.out.expanduser().absolute()
    check_destination(out, args.overwrite)
    args.device, args.dtype = str(_device(args.device)), "float32"
    source = find_source(args.model, allow_pickle=args.allow_pickle)
    common.check_differs(out, source)
    tokenizer = common.need_tokenizer(source)
    results = Results.open(out.with_name(out.name + UNFINISHED), recipe, args)

    input_ids = read_data(
        tokenizer,
        args.data,
        max_tokens=recipe.max_tokens,
        column=args.text_column,
        split=args.data_split,
        progress=not args.quiet,
    )
    results.check_text(input_ids)
    input_ids, held_out_ids = hold_out(input_ids, recipe.length)
    leading, prompts = leading_tokens(tokenizer), _prompts(tokenizer, held_out_ids, recipe)
    held_out = HeldOut(
        held_out_ids,
        context_length=recipe.length,
        leading=leading,
        max_stretches=recipe.eval_stretches,
        prompts=[prompt for prompt in prompts if prompt.task == prompts[0].task],
    )

    model = common.load(source, args)
    common.check_length(model, recipe.length, "--length")
    if results.has_importance:
        load_importance(model, results.importance)
    else:
        convert_model(model, recipe.mask(), calibration=Calibration(input_ids, progress=not args.quiet))
        print(model.flash_dmattn_report)
    measure = {"held_out": held_out, "prompts": prompts, "progress": not args.quiet}
    with _autocast(model):
        results.measure_start(model, **measure)
    for stage in recipe.stages:
        if stage == "importance" and results.has_importance:
            continue
        model, log = train_stage(
            model,
            stage,
            recipe,
            input_ids,
            results.folder / stage,
            leading=leading,
            values=random_values(tokenizer, seed=recipe.seed),
            held_out=held_out,
            callbacks=[DistillProgress(stage, quiet=args.quiet)],
        )
        if stage == "importance":
            save_importance(model, results.importance, base_model=args.model)
        reference = None if stage == "importance" else common.load(source, args)
        if stage == recipe.stages[-1]:  # the weights that are written, in the arithmetic of the other rows
            cast_parameters(model, _own_dtype(source))
            cast_parameters(model, torch.float32)
        with _autocast(model):
            results.measure_stage(model, stage, log, reference=reference, **measure)
        del reference
    cast_parameters(model, _own_dtype(source))
    _write(out, model, tokenizer, results, recipe, args, len(input_ids))


def _write(out, model, tokenizer, results, recipe: Recipe, args: argparse.Namespace, num_tokens: int) -> None:
    model.config.dtype = model.dtype
    facts = {**provenance(model, args), "model": args.model, "data": args.data, "num_tokens": num_tokens}
    print(results.table)
    with atomic_directory(out, overwrite=args.overwrite) as directory:
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
        if "all" not in recipe.stages:  # it fits MODEL as it is
            save_importance(model, directory / IMPORTANCE, base_model=args.model)
        results.write(directory / "distillation", {**facts, "recipe": recipe.to_dict()})
    shutil.rmtree(results.folder)
    print(f"wrote {out}")


def _prompts(tokenizer, input_ids: torch.Tensor, recipe: Recipe) -> list[Prompt]:
    """Returns the prompts of the held-out recall."""
    tasks = list(TASKS) if recipe.tasks is None else list(recipe.tasks)
    if not tasks:
        return []
    options = {"contexts": [recipe.length], "depths": DEPTHS, "samples": recipe.samples, "seed": recipe.seed}
    return recall_prompts(tokenizer, input_ids, tasks=tasks, **options)


def _device(name: str | None) -> torch.device:
    device = common.choose_device(name)
    if device.type not in ("cpu", "cuda") or (device.index or 0) > 0:
        raise ValueError(f"--device must be cpu or cuda, got {name}; CUDA_VISIBLE_DEVICES chooses among GPUs")
    return device


def _autocast(model: PreTrainedModel) -> AbstractContextManager:
    """Measures in the precision of the training."""
    is_cuda = model.device.type == "cuda" and torch.cuda.is_bf16_supported()
    return torch.autocast("cuda", torch.bfloat16) if is_cuda else nullcontext()


def _own_dtype(source: Source) -> torch.dtype:
    """The dtype of a checkpoint's weights, float32 if it does not say."""
    options = {"gguf_file": source.gguf_file} if source.gguf_file else {}
    dtype = AutoConfig.from_pretrained(source.path, trust_remote_code=False, **options).dtype
    return dtype if isinstance(dtype, torch.dtype) else torch.float32
