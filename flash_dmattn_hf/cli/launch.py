"""`flash-dmattn run COMMAND...`: runs a program of this environment with flash_dmattn_hf imported first."""

import argparse
import os
import runpy
import shutil
import sys
import sysconfig
from importlib import metadata
from pathlib import Path

USAGE = """\
usage: flash-dmattn run COMMAND [ARGUMENT ...]

Runs a program of this Python environment in this process, with flash_dmattn_hf imported first. COMMAND is a console
script, -m MODULE, or a Python file. Its exit code is returned, and it gets all signals.

  flash-dmattn run lm_eval --model hf --model_args 'pretrained=PATH,attn_implementation=flash_dmattn' --tasks arc_easy
  flash-dmattn run transformers serve
  flash-dmattn run -m my_package.train
"""


def add_parser(commands, shared: argparse.ArgumentParser) -> None:
    """Adds the command to the command line, for its help; `main` gives everything after "run" to `launch`."""
    commands.add_parser("run", help="run a program with flash_dmattn_hf imported first", add_help=False)


def launch(argv: list[str]) -> int:
    """Runs argv, a program and its arguments, as if it had been called by itself.

    Returns 0, or 2 with one sentence on stderr if there is no such program. What the program raises, SystemExit with
    its exit code among them, passes through.
    """
    if argv[:1] in ([], ["-h"], ["--help"]):
        print(USAGE, end="", file=sys.stdout if argv else sys.stderr)
        return 0 if argv else 2
    if argv[0] == "-m" and len(argv) > 1:
        _import_first_from(os.getcwd())
        sys.argv = argv[1:]
        runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
        return 0
    command = argv[0]
    for script in metadata.entry_points(group="console_scripts", name=command):
        sys.argv = [shutil.which(command) or command, *argv[1:]]
        sys.exit(script.load()())
    path = _find_script(command)
    if path is None:
        print(
            "flash-dmattn run: error: COMMAND must be a console script of this environment, -m MODULE or a Python "
            f"file, got {command}",
            file=sys.stderr,
        )
        return 2
    _import_first_from(os.path.dirname(os.path.realpath(path)))
    sys.argv = [str(path), *argv[1:]]
    runpy.run_path(os.path.abspath(path), run_name="__main__")  # the program may change its folder
    return 0


def _import_first_from(folder: str) -> None:
    """Puts a program's folder where Python puts it, which `python -P` and PYTHONSAFEPATH forbid since Python 3.11."""
    if not getattr(sys.flags, "safe_path", False):
        sys.path.insert(0, folder)


def _find_script(command: str) -> Path | None:
    """Returns a Python file, or a script of this environment that Python runs; None for any other command."""
    if command.endswith(".py"):
        return Path(command) if Path(command).is_file() else None
    path = Path(sysconfig.get_path("scripts"), command)
    if not path.is_file():
        return None
    with open(path, "rb") as file:
        first = file.readline()
    return path if first.startswith(b"#!") and b"python" in first else None
