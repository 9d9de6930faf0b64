"""`flash-dmattn enable` and `flash-dmattn disable`: the start-up hook of this Python environment."""

import argparse
import sysconfig
from pathlib import Path

from flash_dmattn_hf.cli import startup_hook

MODULE, PTH = "_flash_dmattn_hook.py", "flash_dmattn_hook.pth"
LINE = (
    'import os; os.environ.get("FLASH_DMATTN_DISABLE_HOOK") == "1" or exec('
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
        "models then has flash_dmattn_hf imported. FLASH_DMATTN_DISABLE_HOOK=1 turns it off.",
    )
    parser.set_defaults(run=enable)
    parser = commands.add_parser(
        "disable", parents=[shared], help="remove the start-up hook", description="Removes the start-up hook."
    )
    parser.set_defaults(run=disable)


def enable(args: argparse.Namespace) -> None:
    """Writes the two files of the hook, the one that Python reads last."""
    folder = site_packages()
    (folder / MODULE).write_text(Path(startup_hook.__file__).read_text())
    (folder / PTH).write_text(LINE)
    print(f"enabled: {folder / PTH}\nFLASH_DMATTN_DISABLE_HOOK=1 turns it off, and `flash-dmattn disable` removes it")


def disable(args: argparse.Namespace) -> None:
    """Deletes both files."""
    folder = site_packages()
    was_enabled = is_enabled()
    for name in (PTH, MODULE):
        (folder / name).unlink(missing_ok=True)
    print(f"removed from {folder}" if was_enabled else f"was not enabled in {folder}")


def is_enabled() -> bool:
    """Whether Python reads the hook when it starts in this environment."""
    return (site_packages() / PTH).is_file()


def site_packages() -> Path:
    """Returns the folder of this environment whose .pth files Python reads."""
    return Path(sysconfig.get_path("purelib"))
