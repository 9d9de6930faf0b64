"""A directory that appears at its place complete and on disk, or not at all."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PARTIAL, REPLACED = ".partial-", ".replaced-"
"""What the names of temporary siblings contain; one that outlives its run (a kill) can be deleted."""


def check_destination(path: Path, overwrite: bool) -> None:
    """Raises ValueError if `path` cannot be written: it exists and may not, or should not, be replaced."""
    if not path.exists():
        return
    if not path.is_dir():
        raise ValueError(f"OUT must be a directory, got the file {path}")
    if not any(path.iterdir()):
        return
    if not overwrite:
        raise ValueError(f"OUT must not exist, got {path}; pass --overwrite to replace it")
    if not (path / "config.json").is_file():
        raise ValueError(f"OUT must be a checkpoint to be overwritten, but {path} has no config.json")


@contextmanager
def atomic_directory(path: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yields an empty sibling of `path` to write into; it takes that name when the block ends without error.

    All files and directories are synced first. An existing checkpoint is replaced only with `overwrite`,
    and stays until the new one is complete. On an exception the sibling is removed.
    """
    path = Path(path).expanduser().absolute()
    check_destination(path, overwrite)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{path.name}{PARTIAL}", dir=path.parent))
    try:
        yield partial
        partial.chmod(0o777 & ~_umask())
        for file in filter(Path.is_file, partial.rglob("*")):
            file.chmod(0o666 & ~_umask())  # safetensors' own are for their owner alone
        _sync_tree(partial)
        check_destination(path, overwrite)
        _move(partial, path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _move(partial: Path, path: Path) -> None:
    replaced = None
    if path.exists():
        replaced = Path(tempfile.mkdtemp(prefix=f".{path.name}{REPLACED}", dir=path.parent))
        os.rename(path, replaced)
    try:
        os.rename(partial, path)
    except BaseException:
        if replaced is not None:
            os.rename(replaced, path)
        raise
    _sync(path.parent)
    if replaced is not None:
        shutil.rmtree(replaced, ignore_errors=True)


def _sync_tree(root: Path) -> None:
    for directory, _, files in os.walk(root, topdown=False):
        for name in files:
            _sync(Path(directory) / name)
        _sync(Path(directory))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
