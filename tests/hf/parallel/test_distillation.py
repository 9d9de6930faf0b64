"""Distillation on two ranks that share every sequence: figures and weights of one process, with a dense teacher."""

import pytest

from .distillation_jobs import STUDENTS, compile_layers_on_ranks, distil, distil_on_ranks, resume_on_ranks
from .processes import run_on_ranks

pytest.importorskip("accelerate", minversion="1.10")


@pytest.fixture(scope="module")
def on_two_ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    return run_on_ranks(2, folder, distil_on_ranks, list(STUDENTS), str(folder / "run"))


@pytest.mark.parametrize("name", STUDENTS)
def test_two_ranks_distil_as_one(on_two_ranks, tmp_path, name):
    alone = distil(name, str(tmp_path))
    assert len(alone["loss"]) == len(alone["kld"]) == 3 and len(alone["held_out/kld"]) == 2
    for found in on_two_ranks:
        assert isinstance(found, dict), found
        check(found[name], alone)


def test_two_ranks_resume_compiled_as_one_runs_through(tmp_path):
    alone = distil("importance", str(tmp_path / "alone"), gradient_accumulation_steps=2)
    for found in run_on_ranks(2, tmp_path, resume_on_ranks, str(tmp_path)):
        assert isinstance(found, dict), found
        check(found, alone)


def test_two_ranks_distil_with_compiled_layers_as_one_without(tmp_path):
    names = ["hidden states"]
    alone = {name: distil(name, str(tmp_path / "alone")) for name in names}
    for found in run_on_ranks(2, tmp_path, compile_layers_on_ranks, names, str(tmp_path / "run")):
        assert isinstance(found, dict), found
        for name in names:
            check(found[name], alone[name])


def check(found: dict, alone: dict) -> None:
    """Asserts that figures and weights are those of one process."""
    assert found.keys() == alone.keys()
    for key, expected in alone.items():
        assert found[key] == pytest.approx(expected, abs=1e-5, rel=1e-5), key
