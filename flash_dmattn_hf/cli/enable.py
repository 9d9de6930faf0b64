"""`flash-dmattn enable` and `flash-dmattn disable`: the start-up hook of this Python environment."""

import argparse
import os
import py_compile
import sysconfig
from importlib.util import cache_from_source
from pathlib import Path

from flash_dmattn_hf.cli import startup_hook

MODULE, PTH = "_flash_dmattn_hook.py", "flash_dmattn_hook.pth"
DISABLING_VARIABLE = "FLASH_DMATTN_DISABLE_HOOK"
LINE = (
    f'import os; os.environ.get("{DISABLING_VARIABLE}") == "1" or exec('
    '"try:\\n import _flash_dmattn_hook\\n _flash_dmattn_hook.install()\\nexcept Exception:\\n pass")\n'
)
"""What Python runs when it starts: nothing that fails gets out of it."""


def add_parser(commands, shared: argparse.ArgumentParser) -> None:
    """Adds both commands to the command line."""
    parser = commands.add_parser(
        "enable",
        parents=[shared],
        help="a start-up hook for this environment",
        description="Installs a start-up hook into this Python environment. Every program that loads transformers' "
        f"models then has flash_dmattn_hf imported. {DISABLING_VARIABLE}=1 turns it off.",
    )
    parser.set_defaults(run=enable)
    parser = commands.add_parser(
        "disable", parents=[shared], help="remove the start-up hook", description="Removes the start-up hook."
    )
    parser.set_defaults(run=disable)


def enable(args: argparse.Namespace) -> None:
    """Writes the two files of the hook, and the bytecode of one."""
    folder = site_packages()
    for name, text in hook_files().items():
        own = folder / f"{name}.{os.getpid()}"
        try:
            own.write_text(text)
            own.replace(folder / name)  # at once: other programs start, and may enable the hook as well
        finally:
            own.unlink(missing_ok=True)
    py_compile.compile(str(folder / MODULE))  # programs that may not write bytecode would compile it at every start
    print(f"enabled: {folder / PTH}\n{DISABLING_VARIABLE}=1 turns it off, and `flash-dmattn disable` removes it")


def disable(args: argparse.Namespace) -> None:
    """Deletes both files, and the bytecode."""
    folder = site_packages()
    was_enabled = is_enabled()
    for path in (folder / PTH, folder / MODULE, Path(cache_from_source(str(folder / MODULE)))):
        path.unlink(missing_ok=True)
    print(f"removed from {folder}" if was_enabled else f"was not enabled in {folder}")


def hook_files() -> dict[str, str]:
    """Returns name -> text of the files of the hook, the one that Python reads last."""
    return {MODULE: Path(startup_hook.__file__).read_text(), PTH: LINE}


def is_enabled() -> bool:
    """Whether Python reads the hook when it starts in this environment."""
    return all((site_packages() / name).is_file() for name in (MODULE, PTH))


def describe() -> str:
    """Returns in words whether the hook is enabled, and what keeps it from doing what this version's does."""
    folder = site_packages()
    if not is_enabled():
        there = (folder / PTH).is_file()
        return f"broken, {MODULE} is missing: run flash-dmattn enable, or disable" if there else "not enabled"
    if os.environ.get(DISABLING_VARIABLE) == "1":
        return f"enabled, but {DISABLING_VARIABLE}=1 turns it off here"
    is_current = all((folder / name).read_text() == text for name, text in hook_files().items())
    return "enabled" if is_current else "enabled, but not as this version writes it: run flash-dmattn enable again"


def site_packages() -> Path:
    """Returns the folder of this environment whose .pth files Python reads."""
    return Path(sysconfig.get_path("purelib"))
