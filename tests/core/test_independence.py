"""flash_dmattn stands alone: it imports neither transformers nor flash_dmattn_hf, at no time and in no file."""

import ast
import importlib.util
import subprocess
import sys
from pathlib import Path

import flash_dmattn

PACKAGE = Path(flash_dmattn.__file__).parent
FORBIDDEN = {"transformers", "flash_dmattn_hf"}

IMPORT_ALL = """
import importlib, pkgutil, sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {forbidden!r}:
            raise RuntimeError(f"{{name}} is imported")

sys.meta_path.insert(0, Blocker())
import torch
import flash_dmattn

names = ["flash_dmattn", *(module.name for module in pkgutil.walk_packages(flash_dmattn.__path__, "flash_dmattn."))]
for name in names:
    if {has_triton} or "kernel" not in name and ".triton." not in name and ".dense." not in name:
        importlib.import_module(name)
inputs = torch.randn(3, 1, 8, 1, 4, requires_grad=True)
flash_dmattn.dynamic_mask_attention(*inputs, torch.randn(1, 1, 8), keep_window_size=4).sum().backward()
print(len(names))
"""


def forbidden_imports(source: str) -> set[str]:
    """Returns the packages that may not be imported and are, anywhere in a file."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module or "")
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            if getattr(node.func, "attr", getattr(node.func, "id", "")) in ("import_module", "__import__", "find_spec"):
                found.add(str(node.args[0].value))
    return {name for name in found if name.partition(".")[0] in FORBIDDEN}


def test_no_file_imports_it():
    files = sorted(PACKAGE.rglob("*.py"))
    assert len(files) > 50
    for file in files:
        assert not forbidden_imports(file.read_text()), file


def test_an_import_is_found_wherever_it_stands():
    late = "def function():\n    from transformers.utils import logging\n"
    assert forbidden_imports(late) == {"transformers.utils"}
    assert forbidden_imports("import os, flash_dmattn_hf") == {"flash_dmattn_hf"}
    assert forbidden_imports("importlib.import_module('transformers')") == {"transformers"}
    assert not forbidden_imports("import flash_dmattn.slots\n'transformers'\n")


def run(script: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)


def test_all_of_it_is_imported_and_runs_where_an_import_of_it_fails():
    has_triton = importlib.util.find_spec("triton") is not None
    script = IMPORT_ALL.format(forbidden=FORBIDDEN, has_triton=has_triton)
    done = run(script)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= len([file for file in PACKAGE.rglob("*.py")]) - 1
    done = run(script + "import transformers")
    assert done.returncode != 0 and "transformers is imported" in done.stderr
