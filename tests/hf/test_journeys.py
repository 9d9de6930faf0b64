"""How many files a call runs through: what somebody has to read who wants to know what happens."""

import re
import sys
from pathlib import Path

import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList

import flash_dmattn
import flash_dmattn_hf

from .generation_models import greedy, make_model, make_prompt

ROOTS = {package.__name__: Path(package.__file__).parent for package in (flash_dmattn_hf, flash_dmattn)}

MOST_FILES = {"uncached": 14, "step": 14}
"""Of both packages together, in an uncached forward and in one step of `generate`."""
FORWARD = {
    "integration/masks.py",
    "integration/attention.py",
    "cache/handover.py",
    "gates/importance.py",
    "forms.py",
}
"""Files of flash_dmattn_hf that one forward without a cache runs through, in the order in which they come."""
DEFAULT_FORWARD = FORWARD | {"integration/generation.py", "arguments.py"}
"""With the DynamicCache that models in eval mode make by themselves."""
STEP = FORWARD | {"cache/cache.py", "cache/layer.py", "cache/slots.py"}
"""One token of `generate`, or of a loop of one's own, with a DynamicMaskCache."""
CORE_OF_FORWARD = {
    "attention.py",
    "arguments.py",
    "selection.py",
    "competition.py",
    "ranking.py",
    "calls.py",
    "ops.py",
    "dispatch.py",
    "backends/reference.py",
}
"""Files of flash_dmattn in a forward on a CPU, with the reference backend, for a prompt longer than the window."""
CORE_OF_STEP = {
    "token_importance.py",
    "slots.py",
    "arguments.py",
    "dispatch.py",
    "backends/reference_decode.py",
    "ranking.py",
}
"""Files of flash_dmattn in a step on a CPU."""


class Journey:
    """Notes the files of both packages whose functions are called between start and stop."""

    def __init__(self):
        self.files = set()

    def start(self):
        sys.setprofile(self._note)

    def stop(self):
        sys.setprofile(None)

    def _note(self, frame, event, argument):
        if event == "call":
            self.files.add(frame.f_code.co_filename)

    def of(self, package):
        paths = map(Path, self.files)
        return {path.relative_to(ROOTS[package]).as_posix() for path in paths if path.is_relative_to(ROOTS[package])}

    def check(self, expected, expected_of_core):
        assert self.of("flash_dmattn_hf") == expected
        assert self.of("flash_dmattn") == expected_of_core


@pytest.mark.parametrize(
    ("number", "files", "core"), [(1, FORWARD, CORE_OF_FORWARD), (2, STEP, CORE_OF_STEP)], ids=MOST_FILES
)
def test_a_journey_is_short_and_the_page_names_its_files(number, files, core):
    assert len(files) + len(core) <= list(MOST_FILES.values())[number - 1]
    page = (Path(__file__).resolve().parents[2] / "docs/architecture.md").read_text()
    table = page.split(f"## Journey {number}")[1].split("\n\n")[2]
    named = re.findall(r"^\| \d+ \| `(.*?)`", table, re.MULTILINE)
    expected = [f"flash_dmattn_hf/{file}" for file in files] + [f"kernels/flash_dmattn/{file}" for file in core]
    assert sorted(named) == sorted(expected)


@pytest.fixture(autouse=True)
def reference(monkeypatch):
    monkeypatch.delenv("FLASH_DMATTN_BACKEND", raising=False)


@pytest.mark.parametrize(
    "options, expected", [({}, DEFAULT_FORWARD), ({"use_cache": False}, FORWARD)], ids=["default", "uncached"]
)
@torch.no_grad()
def test_a_forward(options, expected):
    model, (ids, _) = make_model("llama-sinks-local"), make_prompt()
    model(ids, **options)
    journey = Journey()
    journey.start()
    model(ids, **options)
    journey.stop()
    journey.check(expected, CORE_OF_FORWARD)


class OneStep(LogitsProcessor):
    """Follows the step between the third token and the fourth."""

    def __init__(self, journey):
        self.journey, self.num_tokens = journey, 0

    def __call__(self, input_ids, scores):
        self.num_tokens += 1
        if self.num_tokens == 3:
            self.journey.start()
        elif self.num_tokens == 4:
            self.journey.stop()
        return scores


def test_a_step_of_generate():
    model, (ids, mask) = make_model("llama-sinks-local"), make_prompt()
    journey = Journey()
    greedy(model, ids, mask, new=6, logits_processor=LogitsProcessorList([OneStep(journey)]))
    journey.check(STEP, CORE_OF_STEP)
