"""`flash-dmattn convert`: a dense checkpoint in, a checkpoint with dynamic masks out."""

import argparse
import sys
from pathlib import Path

from flash_dmattn_hf.cli import common
from flash_dmattn_hf.config import IMPORTANCE_HEADS, IMPORTANCE_INPUTS, DynamicMaskConfig
from flash_dmattn_hf.conversion.atomic_directory import atomic_directory, check_destination
from flash_dmattn_hf.conversion.calibration import Calibration
from flash_dmattn_hf.conversion.checkpoint import find_source, load_tokenizer
from flash_dmattn_hf.conversion.convert import convert_model
from flash_dmattn_hf.conversion.importance_file import load_importance, read_importance
from flash_dmattn_hf.forms import FORMS

MOST_TOKENS = 1 << 17
"""Tokens that are read of a text unless --calibration-tokens asks for more; the largest models need this many."""
DESCRIPTION = """\
Converts a dense causal language model to dynamic masks. The result is an ordinary checkpoint that
`import flash_dmattn_hf` and from_pretrained load. Up to --keep-window-size tokens it computes what the
dense model does; beyond, every query sees the sinks, the newest keys and the most important others.
"""


def add_parser(commands, shared: argparse.ArgumentParser) -> None:
    """Adds the command to the command line."""
    defaults = DynamicMaskConfig()
    parser = commands.add_parser(
        "convert", parents=[shared], help="convert a dense checkpoint", description=DESCRIPTION
    )
    parser.set_defaults(run=run)
    parser.add_argument("model", metavar="MODEL", help="a directory, a .gguf file or a Hub id")
    parser.add_argument("out", metavar="OUT", type=Path, help="directory to write; it appears when it is complete")
    parser.add_argument("--overwrite", action="store_true", help="replace the checkpoint at OUT")
    masks = parser.add_argument_group("dynamic mask")
    masks.add_argument(
        "--keep-window-size",
        type=common.positive,
        metavar="W",
        default=defaults.keep_window_size,
        help="keys that a query sees at most, per head (default: %(default)s)",
    )
    masks.add_argument(
        "--num-sink-tokens", type=common.not_negative, metavar="S", help="first tokens always seen (default: 4)"
    )
    masks.add_argument(
        "--local-window-size",
        type=common.not_negative,
        metavar="R",
        help="newest tokens always seen (default: 3/4 of W)",
    )
    masks.add_argument(
        "--importance-form",
        choices=list(FORMS),
        default=defaults.importance,
        help=f"{', '.join(f'{name}: {form.formula}' for name, form in FORMS.items())} (default: %(default)s)",
    )
    masks.add_argument(
        "--importance-heads",
        choices=IMPORTANCE_HEADS,
        default=defaults.importance_heads,
        help="one importance per kv head, per query head, or for all heads of a layer (default: %(default)s)",
    )
    masks.add_argument(
        "--importance-input",
        choices=IMPORTANCE_INPUTS,
        default=defaults.importance_input,
        help="compute it from a token's values or from its hidden state (default: %(default)s)",
    )
    parser.add_argument_group("trained importance").add_argument(
        "--importance",
        metavar="DIR",
        type=_importance_directory,
        help="take importance and dynamic mask from a directory of flash_dmattn_hf.save_importance",
    )
    calibration = parser.add_argument_group("calibration")
    calibration.add_argument(
        "--calibrate",
        metavar="TEXT",
        type=common.text_file,
        help="UTF-8 text like what the model will read; without it all keys tie until they are trained",
    )
    calibration.add_argument(
        "--calibration-tokens",
        type=common.positive,
        metavar="N",
        help="tokens of TEXT to use (default: 16384, or as many as the model needs)",
    )
    common.add_model_options(parser.add_argument_group("model"))


def _importance_directory(text: str) -> Path:
    """argparse type: an existing directory."""
    path = Path(text).expanduser()
    if not path.is_dir():
        hint = ", a form is chosen with --importance-form" if text in FORMS else ""
        raise argparse.ArgumentTypeError(f"must be a directory, got {text}{hint}")
    return path


def run(args: argparse.Namespace) -> None:
    """Converts, prints the report, writes OUT. Raises ValueError before anything is written."""
    config = DynamicMaskConfig(
        keep_window_size=args.keep_window_size,
        num_sink_tokens=args.num_sink_tokens,
        local_window_size=args.local_window_size,
        importance=args.importance_form,
        importance_heads=args.importance_heads,
        importance_input=args.importance_input,
    )
    if args.calibration_tokens is not None and args.calibrate is None:
        raise ValueError("--calibration-tokens needs --calibrate TEXT")
    if args.importance is not None:
        if config != DynamicMaskConfig() or args.calibrate is not None:
            raise ValueError("--importance brings its dynamic mask with it: leave out its options and --calibrate")
        read_importance(args.importance)  # before anything large is loaded
    out = args.out.expanduser().absolute()
    check_destination(out, args.overwrite)
    source = find_source(args.model, allow_pickle=args.allow_pickle)
    common.check_differs(out, source)
    tokenizer = load_tokenizer(source) if args.calibrate is None else common.need_tokenizer(source)

    model = common.load(source, args)
    calibration = None
    if args.calibrate is not None:
        input_ids = common.read_tokens(tokenizer, args.calibrate, args.calibration_tokens or MOST_TOKENS)
        calibration = Calibration(input_ids, num_tokens=args.calibration_tokens, progress=not args.quiet)
    if args.importance is None:
        convert_model(model, config, calibration=calibration)
    else:
        load_importance(model, args.importance)
    print(model.flash_dmattn_report)

    with atomic_directory(out, overwrite=args.overwrite) as directory:
        model.save_pretrained(directory)
        if tokenizer is not None:
            tokenizer.save_pretrained(directory)
    if tokenizer is None:
        print("flash-dmattn: warning: MODEL has no tokenizer, OUT has none either", file=sys.stderr)
    print(f"wrote {out}")
