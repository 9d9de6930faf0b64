"""Every documented name can be imported from its documented place, wherever its code stands."""

import importlib
import re
import warnings
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
DOCUMENTS = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]

NAMES = {
    "flash_dmattn": """
        CUDA_AVAILABLE FLEX_AVAILABLE TRITON_AVAILABLE NEVER Visibility
        dynamic_mask_attention explain_backends find_blocks get_available_backends interval_attention select_visible
        flash_dmattn_func flash_dmattn_func_auto flash_dmattn_kvpacked_func flash_dmattn_qkvpacked_func
        flash_dmattn_varlen_func flash_dmattn_varlen_kvpacked_func flash_dmattn_varlen_qkvpacked_func
        flex_dmattn_func triton_dmattn_func
    """,
    "flash_dmattn.decode": "cache_capacity find_victim select_survivors",
    "flash_dmattn.slots": "Slots decode_step make_slots refresh_victims",
    "flash_dmattn.utils.mask": "create_mask mask_to_visibility tile_mask",
    "flash_dmattn.integrations.flash_dynamic_mask_attention": "flash_dynamic_mask_attention_forward",
    "flash_dmattn_hf": """
        AttachReport Calibration ConversionReport DynamicMaskCache DynamicMaskConfig ImportanceGate
        convert_model dynamic_mask_config get_gate iter_gates load_importance register save_importance soft_selection
        unregister use_chunked_loss
    """,
    "flash_dmattn_hf.training": """
        DistillationArguments DistillationTrainer FarReuse HeldOut Recipe chunked_distillation_loss train_stage
        ImportanceCallback TemperatureCallback freeze_all_but_importance geometric_schedule importance_parameters
        parameter_groups probe random_values use_chunked_loss
    """,
    "flash_dmattn_hf.chunked_loss": "chunked_cross_entropy",
    "flash_dmattn_hf.cli": "main",
}
"""Place -> names that README, docs/api_reference.md and docs/compatibility.md tell users to import from there."""

MENTION = re.compile(r"(?<![\w./])(flash_dmattn(?:_hf)?(?:\.\w+)+)")
IMPORT = re.compile(r"^from (flash_dmattn(?:_hf)?[\w.]*) import ([\w, ]+)", re.MULTILINE)


def documented():
    """Yields place and name of everything that the documents mention with its place."""
    for path in DOCUMENTS:
        text = path.read_text()
        for mention in MENTION.findall(text):
            if not mention.endswith((".py", ".md", ".json")):
                yield mention.rpartition(".")[::2]
        for place, names in IMPORT.findall(text):
            for name in names.split(","):
                yield place, name.strip()


def stands(place, name):
    """Whether a place has a name, or is a package with a module of that name."""
    if hasattr(importlib.import_module(place), name):
        return True
    try:
        importlib.import_module(f"{place}.{name}")
    except ModuleNotFoundError:
        return False
    return True


@pytest.mark.parametrize("place", NAMES)
def test_a_documented_place_has_its_names(place):
    missing = [name for name in NAMES[place].split() if not stands(place, name)]
    assert not missing, f"{place} has no {', '.join(missing)}"


def test_what_the_documents_mention_exists():
    found = set(documented())
    assert len(found) > 20 and ("flash_dmattn.slots", "decode_step") in found
    missing = sorted(f"{place}.{name}" for place, name in found if not stands(place, name))
    assert not missing


@pytest.mark.parametrize("package", ["flash_dmattn", "flash_dmattn_hf"])
def test_what_is_documented_is_exported(package):
    assert set(importlib.import_module(package).__all__) >= set(NAMES[package].split())


def test_the_deprecated_extension_can_be_imported():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        assert importlib.import_module("flash_dma_cuda")


def test_a_name_that_is_nowhere_is_found():
    assert not stands("flash_dmattn", "nothing") and stands("flash_dmattn", "slots")
