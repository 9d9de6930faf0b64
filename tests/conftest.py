"""One seed for the random tests of a run: fresh every time, printed, replayed by FLASH_DMATTN_TEST_SEED."""

import os
import random

# Workers of pytest-xdist inherit the environment, so all of them draw the same cases.
SEED = int(os.environ.setdefault("FLASH_DMATTN_TEST_SEED", str(random.SystemRandom().randrange(2**31))))


def pytest_report_header():
    return f"random cases: FLASH_DMATTN_TEST_SEED={SEED}"
