"""`flash-dmattn eval --suite recall`: what a model still finds in a text, and how near it is to dense."""

import argparse
import json
from pathlib import Path

import torch
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from flash_dmattn_hf.cli import common
from flash_dmattn_hf.cli.provenance import provenance
from flash_dmattn_hf.conversion.checkpoint import Source, find_source
from flash_dmattn_hf.conversion.convert import convert_model
from flash_dmattn_hf.evaluation import pictures
from flash_dmattn_hf.evaluation.prompts import CONTEXTS, DEPTHS, SAMPLES, Prompt, leading_tokens, recall_prompts
from flash_dmattn_hf.evaluation.report import tables
from flash_dmattn_hf.evaluation.suite import recall_suite
from flash_dmattn_hf.evaluation.tasks import TASKS
from flash_dmattn_hf.gates.attach import iter_gates

OPTIONS = ("tasks", "depths", "samples", "seed", "generate", "teacher", "picture")


def add_options(group: argparse._ArgumentGroup) -> None:
    """Adds what only this suite takes; all default to None."""
    group.add_argument(
        "--tasks", metavar="NAME,NAME", type=lambda text: text.split(","), help=f"of {', '.join(TASKS)} (default: all)"
    )
    group.add_argument(
        "--depths", metavar="D,D", type=_percentages, help="per cent of the text before the key (default: 0,10,...,90)"
    )
    group.add_argument(
        "--samples", metavar="N", type=common.positive, help=f"prompts per task, context and depth (default: {SAMPLES})"
    )
    group.add_argument("--seed", type=int, help="of the prompts (default: 0)")
    group.add_argument(
        "--generate", action="store_true", default=None, help="generate the answers instead of one forward per prompt"
    )
    group.add_argument("--teacher", metavar="MODEL", help="take dense and sinks + window from this model")
    group.add_argument("--picture", metavar="FILE", type=Path, help="draw recall by depth, quality and memory")


def refuse_options(args: argparse.Namespace) -> None:
    """Raises ValueError for an option of this suite given to another."""
    for name in OPTIONS:
        if getattr(args, name) is not None:
            raise ValueError(f"--{name} needs --suite recall")


def run(args: argparse.Namespace) -> None:
    """Prints the tables, writes the JSON file and the picture. All input is checked before a model is loaded."""
    common.check_folder(args.picture, "--picture")
    if args.picture is not None:
        pictures.check_format(args.picture)
    contexts, longest = args.contexts or CONTEXTS, max(args.contexts or CONTEXTS)
    source = find_source(args.model, allow_pickle=args.allow_pickle)
    tokenizer = common.need_tokenizer(source)
    teacher_source = None if args.teacher is None else _teacher_source(args, tokenizer)
    input_ids = common.read_tokens(tokenizer, args.text, args.stretches * longest)
    if len(input_ids) < longest:
        raise ValueError(f"--text must hold at least {longest} tokens, got {len(input_ids)} in {args.text}")
    settings = {
        "tasks": args.tasks or list(TASKS),
        "contexts": list(contexts),
        "depths": list(DEPTHS) if args.depths is None else args.depths,
        "samples": args.samples or SAMPLES,
        "seed": args.seed or 0,
    }
    prompts = recall_prompts(tokenizer, input_ids, **settings)

    model, teacher = _load(source, teacher_source, args, longest)
    windows = args.windows or [next(iter_gates(model))[2].config.keep_window_size]
    rows = recall_suite(
        model,
        input_ids,
        prompts,
        windows=windows,
        context_length=longest,
        teacher=teacher,
        leading=leading_tokens(tokenizer),
        max_stretches=args.stretches,
        generate_with=tokenizer if args.generate else None,
        progress=not args.quiet,
    )
    print(tables(rows))
    print(_explanation(rows, prompts, args, max(windows), longest))
    if args.json is not None:
        facts = {**_facts(model, args), **settings, "windows": windows, "rows": rows}
        args.json.expanduser().write_text(json.dumps(facts, indent=2) + "\n")
    if args.picture is not None:
        facts = _facts(model, args)
        title = f"{args.model} on {facts['device']}, torch {torch.__version__}, {facts['date']}"
        pictures.draw(rows, args.picture.expanduser(), title)


def _teacher_source(args: argparse.Namespace, tokenizer: Tokenizer) -> Source:
    source = find_source(args.teacher, allow_pickle=args.allow_pickle)
    if common.need_tokenizer(source).get_vocab() != tokenizer.get_vocab():
        raise ValueError(f"--teacher must have the vocabulary of MODEL, got another one in {args.teacher}")
    return source


def _load(
    source: Source, teacher_source: Source | None, args: argparse.Namespace, longest: int
) -> tuple[PreTrainedModel, PreTrainedModel | None]:
    """Loads model and teacher; dense ones are converted, the teacher with the settings of the model."""
    model = common.load(source, args)
    common.check_length(model, longest, "--contexts")
    if next(iter_gates(model), None) is None:
        convert_model(model)
    if teacher_source is None:
        return model, None
    teacher = common.load(teacher_source, args)
    if next(iter_gates(teacher), None) is None:
        convert_model(teacher, next(iter_gates(model))[2].config)
    return model, teacher


def _explanation(rows: list[dict], prompts: list[Prompt], args: argparse.Namespace, window: int, longest: int) -> str:
    reference = "the same weights with dense attention" if args.teacher is None else args.teacher
    return (
        f"perplexity, KLD and top-1 against {reference}, on the {rows[0]['num_rows']:,} rows of {args.text} beyond "
        f"{window} tokens; cache of {longest} tokens; {len(prompts):,} prompts of recall per mask"
    )


def _facts(model: PreTrainedModel, args: argparse.Namespace) -> dict:
    """Where the figures come from."""
    return {
        **provenance(model, args),
        "model": args.model,
        "teacher": args.teacher,
        "text": str(args.text),
        "scoring": "generated" if args.generate else "teacher-forced",
    }


def _percentages(text: str) -> list[int]:
    try:
        numbers = sorted({int(part) for part in text.split(",")})
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be integers separated by commas, got {text!r}") from None
    if wrong := [number for number in numbers if not 0 <= number <= 100]:
        raise argparse.ArgumentTypeError(f"must be from 0 to 100, got {wrong[0]}")
    return numbers
