"""One seed for the random tests of a run: fresh every time, printed, replayed by FLASH_DMATTN_TEST_SEED."""

import os
import random

import torch

# Without a GPU the Triton kernels run in Triton's interpreter, which has to be said before triton is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Workers of pytest-xdist inherit the environment, so all of them draw the same cases.
SEED = int(os.environ.setdefault("FLASH_DMATTN_TEST_SEED", str(random.SystemRandom().randrange(2**31))))


def pytest_report_header():
    return f"random cases: FLASH_DMATTN_TEST_SEED={SEED}"
