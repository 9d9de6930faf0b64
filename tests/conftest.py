"""The seed of the tests: every fixture and every test draws numbers of its own, whatever ran before it."""

import os
import random
import zlib

import numpy as np
import pytest
import torch

# Without a GPU the Triton kernels run in Triton's interpreter, which has to be said before triton is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# The same cases in every run, so that a red run is a fault. Another number draws other cases. Workers of pytest-xdist
# and processes that tests start inherit the variable.
SEED = int(os.environ.setdefault("FLASH_DMATTN_TEST_SEED", "0"))


def pytest_report_header():
    return f"random cases: FLASH_DMATTN_TEST_SEED={SEED}"


@pytest.fixture
def seed():
    return SEED


def draw_for(name: str) -> None:
    """Seed all global generators for the fixture or the test of this name."""
    number = zlib.crc32(f"{SEED} {name}".encode())
    random.seed(number)
    np.random.seed(number)
    torch.manual_seed(number)


@pytest.hookimpl(tryfirst=True)
def pytest_fixture_setup(fixturedef, request):
    draw_for(f"{request.node.nodeid} {fixturedef.argname} {request.param_index}")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call(item):
    draw_for(item.nodeid)
