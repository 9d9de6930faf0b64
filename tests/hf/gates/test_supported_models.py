"""The page of supported models is what its records say, and a sample of the records is what a walk finds now."""

import sys
from pathlib import Path

import pytest
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "scripts"))

from checks.families import table, tries

SAMPLE = ["llama", "gpt_oss", "jamba", "bloom"]
RECORDS = table.load(table.path_of(transformers.__version__))


def test_the_page_is_made_of_the_records():
    assert table.PAGE.read_text() == table.page()


@pytest.mark.skipif(not RECORDS, reason="no walk was recorded on this version of transformers")
@pytest.mark.parametrize("model_type", SAMPLE)
def test_the_record_is_current(model_type):
    assert tries.walk(model_type) == RECORDS[model_type]


@pytest.mark.skipif(not RECORDS, reason="no walk was recorded on this version of transformers")
def test_every_model_type_has_a_record():
    assert sorted(RECORDS) == tries.causal_model_types()
    assert not [name for name, record in RECORDS.items() if record["verdict"] == "wrong"]
