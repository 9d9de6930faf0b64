"""The page of supported models is what its records say, and a sample of the records is what a walk finds now."""

import sys
from pathlib import Path

import pytest
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "scripts"))

from checks.families import table, tries
from checks.families.family import TASKS, model_types

SAMPLE = [
    ("causal", "llama"),
    ("causal", "gpt_oss"),
    ("causal", "jamba"),
    ("causal", "bloom"),
    ("causal", "blt"),
    ("causal", "gemma4_assistant"),
    ("text", "paligemma"),
    ("text", "qwen2_5_vl"),
    ("image", "qwen2_5_vl"),
    ("image", "llava"),
    ("image", "mllama"),
    ("image", "chameleon"),
    ("image", "paligemma"),
    ("image", "kosmos-2"),
]
WALKS, RECORDS = table.load(table.path_of(transformers.__version__))
recorded = pytest.mark.skipif(not RECORDS, reason="no walk was recorded on this version of transformers")


def test_the_page_is_made_of_the_records():
    assert table.PAGE.read_text() == table.page()


@recorded
@pytest.mark.parametrize(("task", "model_type"), SAMPLE)
def test_the_record_is_current(task, model_type):
    assert tries.walk(task, model_type) == RECORDS[task][model_type]


@recorded
@pytest.mark.parametrize("task", TASKS)
def test_every_model_type_has_a_record(task):
    assert sorted(RECORDS[task]) == model_types(task)
    assert not [name for name, record in RECORDS[task].items() if record["verdict"] in ("wrong", "not built")]


@recorded
def test_the_records_say_what_ran():
    assert {"command", "commit", "date", "transformers", "torch", "seconds"} <= WALKS[0].keys()
    assert WALKS[0]["transformers"] == transformers.__version__
    assert not [walk["commit"] for walk in WALKS if walk["commit"].endswith("-dirty")]
