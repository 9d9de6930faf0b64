"""Every snippet of the README and of docs/ runs, in order, file by file."""

import re
import shlex
from pathlib import Path

import pytest
from hf.cli_models import tokenizer
from hf.tiny import tiny_model

REPOSITORY = Path(__file__).resolve().parent.parent
DOCUMENTS = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
EVERY_PAGE = [
    *sorted(REPOSITORY.glob("*.md")),
    *(page for folder in ("docs", "examples") for page in sorted((REPOSITORY / folder).rglob("*.md"))),
]
LINK = re.compile(r"\]\(([^)\s#]*)(#[^)\s]*)?\)")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)

CHECKPOINT = "HuggingFaceTB/SmolLM2-135M-Instruct"
"""The checkpoint that the documents name; the tests put a tiny one of the same architecture in its place."""


def snippets(path: Path, language: str) -> list[str]:
    return [body for kind, body in FENCE.findall(path.read_text()) if kind == language]


def with_python() -> list[Path]:
    return [path for path in DOCUMENTS if snippets(path, "python")]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("docs")
    (folder / "text.txt").write_text("".join(f"def add_{i}(a, b):\n    return a + {i * i} * b\n\n" for i in range(400)))
    model = tiny_model("llama", initializer_range=0.3, eos_token_id=None, max_position_embeddings=8192)
    model.save_pretrained(folder / "checkpoint")
    tokenizer().save_pretrained(folder / "checkpoint")
    return folder


@pytest.mark.parametrize("path", with_python(), ids=lambda path: path.name)
def test_python_snippets_run(path, workplace, monkeypatch):
    monkeypatch.chdir(workplace)
    namespace = {"__name__": "snippet"}
    for number, body in enumerate(snippets(path, "python")):
        source = body.replace(CHECKPOINT, "checkpoint")
        exec(compile(source, f"{path.name}, python snippet {number + 1}", "exec"), namespace)


def test_the_command_line_of_the_readme_runs(workplace, monkeypatch):
    from flash_dmattn_hf.cli import main

    monkeypatch.chdir(workplace)
    commands = [
        shlex.split(line, comments=True)
        for body in snippets(REPOSITORY / "README.md", "bash")
        for line in body.replace("\\\n", " ").splitlines()
        if line.startswith("flash-dmattn ")
    ]
    assert {command[1] for command in commands} == {"convert", "info", "eval", "generate"}
    for command in commands:
        arguments = ["checkpoint" if argument == CHECKPOINT else argument for argument in command[1:]]
        assert main(arguments) in (None, 0), command


def test_scripts_that_the_documents_name_exist():
    for path in DOCUMENTS:
        for name in re.findall(r"\b((?:scripts|configs|docs)/[\w./-]+\.\w+)", path.read_text()):
            assert (REPOSITORY / name).exists(), f"{path.name} names {name}, which does not exist"


def anchors(path: Path) -> set[str]:
    """The anchors that the headings of a page get."""
    titles = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
    return {"#" + re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("path", EVERY_PAGE, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_every_link_leads_somewhere(path):
    for target, anchor in LINK.findall(path.read_text()):
        if target.startswith(("https:", "mailto:")):
            continue
        page = (path.parent / target).resolve() if target else path
        assert page.exists(), f"links to {target}, which does not exist"
        assert not anchor or anchor in anchors(page), f"links to {target}{anchor}, but there is no such heading"


def test_the_list_of_pages_has_every_page():
    listed = {target for target, _ in LINK.findall((REPOSITORY / "docs" / "README.md").read_text())}
    assert {path.name for path in (REPOSITORY / "docs").glob("*.md")} - listed == {"README.md"}


def test_every_result_is_linked_from_a_page():
    pages = "".join(path.read_text() for path in EVERY_PAGE)
    results = [file for folder in ("benchmarks", "demo") for file in (REPOSITORY / "docs" / folder).iterdir()]
    assert results
    assert not [file.name for file in results if f"{file.parent.name}/{file.name})" not in pages]
