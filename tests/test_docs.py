"""Every snippet of the README and of docs/ runs, in order, file by file."""

import re
import shlex
from pathlib import Path

import pytest
from hf.cli_models import tokenizer
from hf.tiny import tiny_model

REPOSITORY = Path(__file__).resolve().parent.parent
DOCUMENTS = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
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
