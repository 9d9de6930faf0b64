"""A sequence on 2 and 4 ranks trains as one process does: outputs, loss, and the gradients of all parameters."""

import pytest

from .jobs import CASES, compare
from .processes import run_on_ranks


@pytest.fixture(scope="module")
def differences(tmp_path_factory):
    """Returns what `compare` does for all cases on each rank, by the number of ranks."""
    sizes = (2, 4)
    return {size: run_on_ranks(size, tmp_path_factory.mktemp("ranks"), compare, list(CASES)) for size in sizes}


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("name", CASES)
def test_ranks_train_as_one_process(differences, name, world_size):
    for rank, found in enumerate(differences[world_size]):
        assert isinstance(found, dict), found
        wrong = {part: error for part, error in found[name].items() if not error < 1e-9}
        assert not wrong, f"rank {rank}: {wrong}"
