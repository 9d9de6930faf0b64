"""Builds the library and reports its kernels: python -m cuda_build FOLDER (with kernels/ on PYTHONPATH).

Environment variables choose what is built, see `cuda_build.settings.read_settings`.
"""

import argparse
import os
import shutil
import sys
from pathlib import Path

from cuda_build.library import build_library
from cuda_build.resources import (
    ALLOWED_SPILLS,
    compile_seconds,
    find_spill_regressions,
    format_table,
    read_resources,
)
from cuda_build.settings import read_settings
from cuda_build.toolkit import MissingTool, find_toolkit


def main() -> int:
    parser = argparse.ArgumentParser(prog="cuda_build", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where objects and library go, reused by the next build")
    parser.add_argument("--no-link", action="store_true", help="compile only")
    parser.add_argument("--copy-to", type=Path, metavar="DIR", help="also copy the library there")
    parser.add_argument("--table", type=Path, metavar="FILE", help="write the table there, besides printing it")
    parser.add_argument("--check-spills", action="store_true", help=f"fail on spills beyond {ALLOWED_SPILLS.name}")
    arguments = parser.parse_args()

    try:
        toolkit = find_toolkit()
    except MissingTool as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    build = build_library(read_settings(), toolkit, arguments.folder, link=not arguments.no_link)
    if arguments.copy_to:
        # A running process may have the old file mapped, so it is replaced and not written over.
        copied = shutil.copy2(build.library, arguments.copy_to / f"{build.library.name}.new")
        os.replace(copied, arguments.copy_to / build.library.name)
    kernels = read_resources(build)
    table = format_table(kernels, compile_seconds(build))
    print(table, end="")
    if arguments.table:
        arguments.table.write_text(table)
    regressions = find_spill_regressions(kernels, ALLOWED_SPILLS.read_text()) if arguments.check_spills else []
    for regression in regressions:
        print(f"error: {regression}", file=sys.stderr)
    return 1 if regressions else 0


if __name__ == "__main__":
    sys.exit(main())
