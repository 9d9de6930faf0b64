"""The command line `flash-dmattn`: convert or distill, say what runs here, measure, generate, run programs."""

import argparse
import os
import shlex
import signal
import sys
import threading
import warnings

import torch

from flash_dmattn_hf.cli import convert, distill, enable, evaluate, generate, info, launch
from flash_dmattn_hf.conversion.checkpoint import first_line

COMMANDS = (convert, distill, info, evaluate, generate, launch, enable)
BAD_INPUT = (ValueError, OSError, ImportError, NotImplementedError, torch.OutOfMemoryError)
"""What this package, transformers and torch raise for a request they cannot serve; anything else is a bug."""


def main(argv: list[str] | None = None) -> int:
    """Runs one command. Returns 0, 2 for bad input (one sentence on stderr), 130 when interrupted.

    What a program of `flash-dmattn run` raises passes through, SystemExit with its exit code among them.
    """
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["run"]:
        return launch.launch(argv[1:])
    args = build_parser().parse_args(argv)
    args.command_line = shlex.join(["flash-dmattn", *argv])
    if args.quiet or not sys.stderr.isatty():
        _silence_progress_bars()
    # a request to convert a repository's pickles on the Hub would be opened in the user's name
    os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "1")
    can_handle = threading.current_thread() is threading.main_thread()
    handler = signal.signal(signal.SIGTERM, _terminate) if can_handle else None
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            args.run(args)
    except BAD_INPUT as error:
        if args.debug:
            raise
        print(f"flash-dmattn {args.command}: error: {first_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        if args.debug:
            raise
        print(f"flash-dmattn {args.command}: interrupted", file=sys.stderr)
        return 130
    finally:
        if can_handle:
            signal.signal(signal.SIGTERM, handler)
    return 0


def build_parser() -> argparse.ArgumentParser:
    """Returns the parser; `args.run` is the chosen command's function."""
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--quiet", action="store_true", help="no progress bars")
    shared.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser = argparse.ArgumentParser(prog="flash-dmattn", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add_parser(commands, shared)
    return parser


def _silence_progress_bars() -> None:
    from transformers import modeling_gguf_pytorch_utils
    from transformers.utils import logging

    logging.disable_progress_bar()
    modeling_gguf_pytorch_utils.tqdm = logging.tqdm  # the one bar that does not ask


def _show_warning(message, category, filename, lineno, file=None, line=None) -> None:
    print(f"flash-dmattn: warning: {first_line(message)}", file=sys.stderr)


def _terminate(signum, frame) -> None:
    sys.exit(128 + signum)
