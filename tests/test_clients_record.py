"""The record of tests/clients: what passed, failed and was skipped, and why."""

import os
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
TESTS = """
import pytest

def test_right(): pass

def test_wrong(): assert 1 == 2, "one is not two"

def test_elsewhere(): pytest.importorskip("no_such_library")
"""


def test_it_says_what_came_of_every_test(tmp_path):
    (tmp_path / "test_some.py").write_text(TESTS)
    record = tmp_path / "record.txt"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "scripts.checks.clients_record"]
    command += ["--clients-record", str(record), "--clients-command", "a command", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    header, outcomes = record.read_text().split("\n\n")
    values = dict(line.split(maxsplit=1) for line in header.splitlines()[1:])
    assert values["command"] == "a command" and values["date"].endswith("UTC")
    assert values["torch"] and values["transformers"]
    passed, failed, skipped, sums = outcomes.splitlines()
    assert passed.startswith("passed   test_some.py::test_right")
    assert failed.startswith("failed   test_some.py::test_wrong: AssertionError: one is not two")
    assert skipped.startswith("skipped  test_some.py::test_elsewhere: could not import 'no_such_library'")
    assert sums == "1 passed, 1 failed, 0 error, 1 skipped"
