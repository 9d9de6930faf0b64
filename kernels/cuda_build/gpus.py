"""The GPUs of the machine that builds, as nvidia-smi lists them."""

import re
import shutil
import subprocess
from collections.abc import Mapping

_ARCHITECTURES = {"8": "80", "9": "90", "10": "100", "12": "120"}  # by the major number of the compute capability


class CannotAsk(RuntimeError):
    """nvidia-smi does not say which GPUs are here; the text is its own."""


def list_capabilities(environment: Mapping[str, str]) -> list[str]:
    """Returns the compute capabilities of the GPUs here, such as ["9.0"], sorted; empty without GPUs or nvidia-smi.

    Raises `CannotAsk` where nvidia-smi is there and fails.
    """
    program = shutil.which("nvidia-smi", path=environment.get("PATH", ""))
    if program is None:
        return []
    command = [program, "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        asked = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CannotAsk(str(error)) from error
    if asked.returncode != 0:
        words = (asked.stdout + asked.stderr).strip() or f"exit status {asked.returncode}"
        raise CannotAsk(words.splitlines()[0])
    return sorted(set(re.findall(r"^\d+\.\d$", asked.stdout, re.MULTILINE)), key=float)


def architecture_for(capability: str) -> str | None:
    """Returns the architecture whose code runs on a GPU of this compute capability, None if there is none."""
    major, minor = capability.split(".")
    is_other_hopper = major == "9" and minor != "0"  # code for sm_90a runs on 9.0 alone
    return None if is_other_hopper else _ARCHITECTURES.get(major)
