"""Importing flash_dmattn_hf leaves dense models alone: same numbers, same errors, in every version of transformers."""

import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from flash_dmattn_hf.versions import TESTED, is_covered, warn_if_untested

SESSION = Path(__file__).with_name("dense_session.py")


@pytest.fixture(scope="module")
def sessions(tmp_path_factory):
    """What dense models do without our import, and with it."""
    folder = tmp_path_factory.mktemp("dense")
    found = []
    for argument in ([], ["import"]):
        out = folder / f"{len(argument)}.pt"
        done = subprocess.run([sys.executable, SESSION, out, *argument], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        found.append(torch.load(out))
    return found


def test_dense_models_compute_the_same(sessions):
    without, with_import = sessions
    assert without.keys() == with_import.keys()
    results = [key for key, found in without.items() if not isinstance(found, str)]
    assert len(results) >= 85
    for key in results:
        assert not isinstance(with_import[key], str), f"{key}: {with_import[key]}"
        assert len(without[key]) == len(with_import[key]) > 0, key
        assert all(map(torch.equal, without[key], with_import[key])), key


def test_dense_models_raise_the_same(sessions):
    without, with_import = sessions
    errors = {key: found for key, found in without.items() if isinstance(found, str)}
    assert len(errors) >= 20
    assert errors == {key: with_import[key] for key in errors}


@pytest.mark.parametrize("version", TESTED)
def test_a_tested_version_is_covered(version):
    assert is_covered(version)


@pytest.mark.parametrize("version", ["5.16.9", "5.25.0", "6.0.0"])
def test_an_untested_version_warns_by_name(version):
    with pytest.warns(UserWarning, match=f"tested with transformers .* not with {version}"):
        warn_if_untested(version)


@pytest.mark.parametrize("version", ["5.20.1", "5.24.9"])
def test_versions_between_tested_ones_do_not_warn(version):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_if_untested(version)
