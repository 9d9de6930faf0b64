"""The page of supported models: for every recorded version of transformers a table per task."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

from checks.families.tries import COLUMNS

REPOSITORY = Path(__file__).resolve().parents[3]
RECORDS = REPOSITORY / "docs" / "benchmarks"
PAGE = REPOSITORY / "docs" / "supported_models.md"

Records = dict[str, dict[str, dict[str, Any]]]
"""Task -> model type -> record."""

TITLES = {
    "causal": "Causal language models",
    "text": "Image-text models, text alone",
    "image": "Image-text models, an image and text",
}

_HEAD = """# Supported models

This page says of every causal language model and of every image-text model of transformers whether it can use dynamic
masks, and what was tried to find out. `python scripts/checks/walk_families.py` writes it. A tiny random model of every
type is saved and loaded by name. No dropout is on. Image-text models are tried twice: with text alone, and with an
image, which is random pixels and the tokens that stand for them. Where they take types of tokens, they get those that
their processors give. PaliGemma gets a prefix of 10 tokens.

| column | what must hold |
| --- | --- |
| gates | how many layers have a gate at `keep_window_size=8` (9 with an image, PaliGemma 14); others stay as they are |
| equal | the logits of eager attention, while all tokens fit into the window |
| definition | the logits of a mask written out in full, beyond the window |
| padding | the logits of a mask written out in full, with left padding, up to the window and beyond |
| packing | two documents in a row, told apart by `position_ids`, are as each alone; an image is in the first |
| backward | the gradients of a mask written out in full, for all weights |
| generate | the logits of generation with the constant-size cache are those without a cache |
| reload | a saved model comes back with its gates |

An outcome is "yes", "no" or "refused", which is an error with a reason. "as eager" means that eager attention does not
do it either, such as recurrent layers that mix packed documents. "no positions" means that the model takes no
`position_ids`.

A model is *right* if every column holds, and *partly* right if one of them is refused. A *refused* model raises the
sentence in the last column when it is loaded or first called. One that is *not tried* takes no images, or no text
without an image. One that is *unbuildable* cannot be made or called by transformers itself, even with its default
config. For one that is *not built*, no tiny model or no image was made.
"""


def path_of(version: str) -> Path:
    """The file of the records of a version of transformers."""
    return RECORDS / f"families_{version}.json"


def load(path: Path) -> tuple[list[dict[str, Any]], Records]:
    """What ran (command, commit, date, versions, seconds), and the records; both empty if there is no such file."""
    content = json.loads(path.read_text()) if path.exists() else {"walks": [], "records": {}}
    return content["walks"], content["records"]


def save(path: Path, walks: list[dict[str, Any]], records: Records) -> None:
    records = {task: dict(sorted(records[task].items())) for task in TITLES if task in records}
    path.write_text(json.dumps({"walks": walks, "records": records}, indent=1) + "\n")


def page() -> str:
    """The page made of all records, newest version first."""
    paths = sorted(RECORDS.glob("families_*.json"), key=_version, reverse=True)
    return "\n".join([_HEAD, *(_section(path) for path in paths)])


def _version(path: Path) -> tuple[int, ...]:
    return tuple(int(number) for number in path.stem.removeprefix("families_").split(".") if number.isdigit())


def _section(path: Path) -> str:
    walks, records = load(path)
    commits = list(dict.fromkeys(walk["commit"] for walk in walks))
    lines = [
        f"## transformers {path.stem.removeprefix('families_')}",
        "",
        f"[What ran, and the records]({path.relative_to(PAGE.parent).as_posix()}): "
        f"{'commits' if len(commits) > 1 else 'commit'} {', '.join(commits)}; {walks[-1]['date']}.",
        "",
    ]
    return "\n".join([*lines, *(_table(title, records.get(task, {})) for task, title in TITLES.items())])


def _table(title: str, records: dict[str, dict[str, Any]]) -> str:
    counts = Counter(record["verdict"] for record in records.values())
    total = ", ".join(f"{number} {verdict}" for verdict, number in counts.most_common())
    names = ["model type", "verdict", "gates", *COLUMNS, "reason"]
    lines = [f"### {title}", "", f"{len(records)} model types: {total}.", ""]
    lines += [f"| {' | '.join(names)} |", f"|{' --- |' * len(names)}"]
    for name, record in sorted(records.items()):
        tried = [record["tried"].get(column, "") for column in COLUMNS]
        lines.append(f"| {' | '.join([name, record['verdict'], record['gates'], *tried, record['reason']])} |")
    return "\n".join([*lines, ""])
