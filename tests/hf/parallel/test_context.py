"""A sequence on 2 and 4 ranks trains as one process does: outputs, loss, and the gradients of all parameters."""

import pytest

from .jobs import CASES, compare
from .processes import run_on_ranks


@pytest.fixture(scope="module")
def differences(tmp_path_factory):
    """Returns what `compare` does for all cases on each rank, by the number of ranks."""
    sizes = (2, 4)
    return {size: run_on_ranks(size, tmp_path_factory.mktemp("ranks"), compare, list(CASES)) for size in sizes}


def allowed(name: str, part: str) -> float:
    """The norms of these models work in float32, and so does the loss of whole logits."""
    if (CASES[name].model_type == "gemma2" and "norm" in part) or (name, part) == ("whole logits", "loss"):
        return 1e-6
    return 1e-9


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("name", CASES)
def test_ranks_train_as_one_process(differences, name, world_size):
    found = differences[world_size]
    assert all(isinstance(each, dict) for each in found), found
    wrong = {part: error for part, error in found[0][name].items() if not error < allowed(name, part)}
    assert found[0][name] and not wrong, wrong
