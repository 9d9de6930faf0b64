"""The paths that the recipes and the maps of the code name exist."""

import re
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
PAGES = ("CONTRIBUTING.md", "docs/architecture.md", "docs/kernels.md")
PATH = re.compile(r"\b(?:flash_dmattn_hf|kernels|tests|scripts|docs|configs|examples)(?:/[\w.-]*\w)+")


def paths_of(page: str) -> set[str]:
    """The paths of a page that are relative to the repository, in code and in links alike."""
    return set(PATH.findall((REPOSITORY / page).read_text()))


@pytest.mark.parametrize(("page", "path"), [(page, path) for page in PAGES for path in sorted(paths_of(page))])
def test_the_path_exists(page, path):
    assert (REPOSITORY / path).exists()


def test_every_recipe_names_its_files():
    recipes = (REPOSITORY / "CONTRIBUTING.md").read_text().split("## Recipe: ")[1:]
    assert len(recipes) == 5
    for recipe in recipes:
        steps = re.findall(r"^\d+\. ", recipe, re.MULTILINE)
        assert len(steps) >= 6 and len(PATH.findall(recipe)) >= len(steps) - 1, recipe.splitlines()[0]
