"""docs/compatibility.md says what the code does: its rows are walked, signatures compared, tests found."""

import importlib
import inspect
import re
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
TESTS = REPOSITORY / "tests"
PAGE = (REPOSITORY / "docs" / "compatibility.md").read_text()


def rows(heading):
    section = PAGE.split(f"## {heading}\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


FUNCTIONS, BEHAVIOUR = rows("Functions"), rows("Behaviour")
BENCHMARKS, ENVIRONMENT = rows("Benchmarks"), rows("Environment")


def signature(function):
    shown, is_keyword_only = [], False
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and not is_keyword_only:
            shown.append("*")
            is_keyword_only = True
        name = f"**{parameter.name}" if parameter.kind is parameter.VAR_KEYWORD else parameter.name
        shown.append(name if parameter.default is parameter.empty else f"{name}={parameter.default!r}")
    return ", ".join(shown)


@pytest.mark.parametrize("row", FUNCTIONS, ids=lambda row: row[0].strip("`").split(".")[-1])
def test_functions_have_the_arguments_of_the_table(row):
    module, _, name = row[0].strip("`").rpartition(".")
    function = getattr(importlib.import_module(module), name)
    assert signature(function) == row[1].strip("`")
    assert function.__doc__


ROWS = FUNCTIONS + BEHAVIOUR + BENCHMARKS + ENVIRONMENT


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0].strip("`").split(".")[-1])
def test_every_row_names_a_test(row):
    file, name = row[-1].strip("`").split("::")
    found = [path for path in (TESTS / "core" / file, TESTS / file) if path.exists()]
    assert len(found) == 1 and re.search(rf"^def {name}\(", found[0].read_text(), re.MULTILINE), row[-1]


@pytest.mark.parametrize("row", BENCHMARKS, ids=lambda row: row[0].strip("`").split("/")[-1])
def test_every_benchmark_is_there(row):
    assert (REPOSITORY / row[0].strip("`")).exists()


def test_the_page_has_all_names():
    assert len(FUNCTIONS) == 12 and len(BEHAVIOUR) >= 20
    assert len(BENCHMARKS) == 4 and len(ENVIRONMENT) == 5
    package = importlib.import_module("flash_dmattn")
    named = {row[0].strip("`").rpartition(".")[2] for row in FUNCTIONS}
    assert {name for name in package.__all__ if "dmattn" in name} <= named
