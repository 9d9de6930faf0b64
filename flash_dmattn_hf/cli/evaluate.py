"""`flash-dmattn eval`: dense against sinks + window against the model's own importance, on the user's text."""

import argparse
import json
from pathlib import Path

from flash_dmattn_hf.cli import common, recall
from flash_dmattn_hf.cli.info import versions
from flash_dmattn_hf.conversion.checkpoint import find_source
from flash_dmattn_hf.conversion.convert import convert_model
from flash_dmattn_hf.evaluation.perplexity import perplexity
from flash_dmattn_hf.evaluation.rows import rows_of
from flash_dmattn_hf.gates.attach import iter_gates

DESCRIPTION = """\
Cuts a text into stretches as long as the longest context and scores the end of each: as many tokens as half
of the shortest context. A shorter context or window changes what the model sees, never which tokens are
scored, so all numbers of the table can be compared. A dense MODEL is converted in memory, uncalibrated.
With --suite recall it measures what the model still finds in a text, and how near it is to dense, instead.
"""
CONTEXTS = [1024, 2048]


def add_parser(commands, shared: argparse.ArgumentParser) -> None:
    """Adds the command to the command line."""
    parser = commands.add_parser(
        "eval", parents=[shared], help="perplexity, or recall, at several windows", description=DESCRIPTION
    )
    parser.set_defaults(run=run)
    parser.add_argument("model", metavar="MODEL", help="a directory, a .gguf file or a Hub id")
    parser.add_argument("--text", metavar="FILE", type=common.text_file, required=True, help="UTF-8 text to score")
    parser.add_argument(
        "--suite", choices=("perplexity", "recall"), default="perplexity", help="what to measure (default: %(default)s)"
    )
    parser.add_argument(
        "--windows", metavar="W,W", type=common.positive_list, help="keep_window_size (default: the model's own)"
    )
    parser.add_argument(
        "--contexts",
        metavar="N,N",
        type=common.positive_list,
        help="tokens given to the model (default: 1024,2048, and 4096 with --suite recall)",
    )
    parser.add_argument(
        "--stretches", metavar="N", type=common.positive, default=8, help="stretches of the text (default: 8)"
    )
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the numbers there, too")
    recall.add_options(parser.add_argument_group("recall"))
    common.add_model_options(parser.add_argument_group("model"))


def run(args: argparse.Namespace) -> None:
    """Prints the tables and writes the files of the chosen suite."""
    common.check_folder(args.json, "--json")
    if args.suite == "recall":
        recall.run(args)
        return
    recall.refuse_options(args)
    contexts = args.contexts or CONTEXTS
    stretch_length, score_last = max(contexts), min(contexts) // 2
    if score_last < 1:
        raise ValueError(f"--contexts must be at least 2, got {min(contexts)}")
    source = find_source(args.model, allow_pickle=args.allow_pickle)
    tokenizer = common.need_tokenizer(source)
    input_ids = common.read_tokens(tokenizer, args.text, args.stretches * stretch_length)
    if len(input_ids) < stretch_length:
        raise ValueError(f"--text must hold at least {stretch_length} tokens, got {len(input_ids)} in {args.text}")
    model = common.load(source, args)
    common.check_length(model, stretch_length, "--contexts")
    if next(iter_gates(model), None) is None:
        convert_model(model)
    windows = args.windows or [next(iter_gates(model))[2].config.keep_window_size]

    rows, num_tokens = [], 0
    for mask in rows_of(model, windows):
        row = {"mask": mask.label, "perplexity": {}}
        with mask.variant:
            for context in contexts:
                score = perplexity(
                    mask.model,
                    input_ids,
                    context_length=context,
                    score_last=score_last,
                    stretch_length=stretch_length,
                    progress=None if args.quiet else f"{mask.label}, context {context}",
                )
                row["perplexity"][context] = score.perplexity
                num_tokens = score.num_tokens
        rows.append(row)
    print(table(rows, contexts))
    print(f"perplexity of the same {num_tokens:,} tokens of {args.text} in every column and row")
    if args.json is not None:
        facts = {"model": args.model, "text": str(args.text), "num_tokens": num_tokens, "rows": rows}
        args.json.expanduser().write_text(json.dumps({**facts, "versions": versions()}, indent=2) + "\n")


def table(rows: list[dict], contexts: list[int]) -> str:
    """Returns the rows as text, one column per context."""
    width = max(len(row["mask"]) for row in rows)
    lines = [f"{'mask':{width}}" + "".join(f"{f'N = {context}':>14}" for context in contexts)]
    for row in rows:
        lines.append(f"{row['mask']:{width}}" + "".join(f"{row['perplexity'][c]:14.3f}" for c in contexts))
    return "\n".join(lines)
