"""Shows what a build does although pip keeps its output to itself: on the terminal, where there is one."""

import contextlib
import os
import sys
from collections.abc import Iterable, Mapping
from typing import TextIO

IN_PIP = "_PYPROJECT_HOOKS_BUILD_BACKEND"
"""The environment variable with which pip and its kin start a build."""


def say(message: str) -> None:
    """Prints a sentence of the build to stderr, and to the terminal where a tool keeps stderr to itself."""
    print(f"flash_dmattn: {message}", file=sys.stderr, flush=True)
    if terminal := open_terminal():
        _close(_show(terminal, f"\r\033[Kflash_dmattn: {message}\n"))


def show_progress(lines: Iterable[str]) -> None:
    """Passes the lines of a compiler to stderr; the terminal shows the newest one of them, in one line."""
    terminal = open_terminal()
    for line in lines:
        sys.stderr.write(line)
        sys.stderr.flush()
        terminal = _show(terminal, f"\r\033[K{line.rstrip()[:100]}")
    _close(_show(terminal, "\r\033[K"))


def open_terminal(environment: Mapping[str, str] = os.environ, path: str = "/dev/tty") -> TextIO | None:
    """Returns the terminal to write to inside a build of pip, None elsewhere or without one."""
    if IN_PIP not in environment or sys.stderr.isatty():
        return None
    try:
        return open(path, "w")
    except OSError:
        return None


def _show(terminal: TextIO | None, text: str) -> TextIO | None:
    """Writes to the terminal, if there is one; returns it, None when it is lost: the build goes on without it."""
    if terminal is None:
        return None
    try:
        terminal.write(text)
        terminal.flush()
    except OSError:
        _close(terminal)
        return None
    return terminal


def _close(terminal: TextIO | None) -> None:
    with contextlib.suppress(OSError):  # what a lost terminal has not taken is written once more
        if terminal is not None:
            terminal.close()
