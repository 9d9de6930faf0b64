import os

import pytest
import torch


@pytest.fixture(autouse=True)
def seeded():
    """Every test draws from the seed of the run, whatever ran before it."""
    torch.manual_seed(int(os.environ["FLASH_DMATTN_TEST_SEED"]))
