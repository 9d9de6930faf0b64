"""The order of the rooms of flash_dmattn_hf: a room imports only from itself, its own level and the levels below."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "flash_dmattn_hf"

LEVELS = [
    {"arguments", "config", "forms", "names", "progress", "thread_slot", "versions"},
    {"gates"},
    {"cache", "parallel"},
    {"integration"},
    {"conversion", "evaluation", "training"},
    {"cli"},
]
"""The rooms and single files of the package, lowest first."""

PLACES_OF_OLD = {"chunked_loss"}
"""Files that only name what is in a room, because users import it from there."""


def level_of(place: str) -> int:
    return next(number for number, places in enumerate(LEVELS) if place in places)


def imported_places(file: Path) -> set[str]:
    """Returns the rooms and single files of the package that a file imports from, wherever in it."""
    places = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file} has a relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        places.update(name.split(".")[1] for name in names if name.startswith("flash_dmattn_hf."))
    return places


def files_of(place: str) -> list[Path]:
    return sorted((PACKAGE / place).rglob("*.py")) or [PACKAGE / f"{place}.py"]


PLACES = [place for level in LEVELS for place in sorted(level)]


@pytest.mark.parametrize("place", PLACES)
def test_a_room_imports_nothing_from_above_it(place):
    for file in files_of(place):
        for imported in imported_places(file):
            assert level_of(imported) <= level_of(place), f"{file.relative_to(PACKAGE)} imports {imported}"


def test_every_place_has_a_level():
    places = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert places - {"__init__"} - PLACES_OF_OLD == set(PLACES)


def test_an_import_that_runs_up_is_found(tmp_path):
    file = tmp_path / "gate.py"
    file.write_text("def late():\n    from flash_dmattn_hf.cache import DynamicMaskCache\n")
    assert imported_places(file) == {"cache"}
    assert level_of("cache") > level_of("gates")
