"""The page of supported models: one table for every recorded version of transformers."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

from checks.families.tries import COLUMNS

REPOSITORY = Path(__file__).resolve().parents[3]
RECORDS = REPOSITORY / "docs" / "benchmarks"
PAGE = REPOSITORY / "docs" / "supported_models.md"

_HEAD = """# Supported models

This page says of every causal language model of transformers whether it can use dynamic masks, and what was tried to
find out. `python scripts/checks/walk_families.py` writes it. A tiny random model of every type is saved and loaded by
name. No dropout is on.

| column | what must hold |
| --- | --- |
| gates | how many layers have an importance gate at `keep_window_size=8`; the others keep their own attention |
| equal | the logits of eager attention, while all tokens fit into the window |
| definition | the logits of a mask written out in full, beyond the window |
| padding | the logits of a mask written out in full, with left padding, up to the window and beyond |
| packing | two documents in a row, told apart by `position_ids`, are as each alone |
| backward | the gradients of a mask written out in full, for all weights |
| generate | the logits of generation with the constant-size cache are those without a cache |
| reload | a saved model comes back with its gates |
| static | the logits of generation with a static cache are those without one; a model that refuses it may be right |

An outcome is "yes", "no" or "refused", which is an error with a reason. "as eager" means that eager attention does not
do it either, such as recurrent layers that mix packed documents. "no positions" means that the model takes no
`position_ids`.

A model is *right* if every column holds, and *partly* right if one of them is refused. A *refused* model raises the
sentence in the last column when it is loaded or first called. For one that is *not built*, no tiny model was made.
"""


def path_of(version: str) -> Path:
    """The file of the records of a version of transformers."""
    return RECORDS / f"families_{version}.json"


def records_link(version: str) -> str:
    """Where the page finds the records of a version."""
    return path_of(version).relative_to(PAGE.parent).as_posix()


def load(path: Path) -> dict[str, dict[str, Any]]:
    """Model type -> record; empty if there is no such file."""
    return json.loads(path.read_text()) if path.exists() else {}


def save(path: Path, records: dict[str, dict[str, Any]]) -> None:
    path.write_text(json.dumps(dict(sorted(records.items())), indent=1) + "\n")


def page() -> str:
    """The page made of all records, newest version first."""
    paths = sorted(RECORDS.glob("families_*.json"), key=_version, reverse=True)
    return "\n".join([_HEAD, *(_section(path.stem.removeprefix("families_"), load(path)) for path in paths)])


def _version(path: Path) -> tuple[int, ...]:
    return tuple(int(number) for number in path.stem.removeprefix("families_").split(".") if number.isdigit())


def _section(version: str, records: dict[str, dict[str, Any]]) -> str:
    counts = Counter(record["verdict"] for record in records.values())
    total = ", ".join(f"{number} {verdict}" for verdict, number in counts.most_common())
    names = ["model type", "verdict", "gates", *COLUMNS, "reason"]
    lines = [
        f"## transformers {version}",
        "",
        f"{len(records)} model types: {total} ([records]({records_link(version)})).",
        "",
    ]
    lines += [f"| {' | '.join(names)} |", f"|{' --- |' * len(names)}"]
    for name, record in sorted(records.items()):
        tried = [record["tried"].get(column, "") for column in COLUMNS]
        lines.append(f"| {' | '.join([name, record['verdict'], record['gates'], *tried, record['reason']])} |")
    return "\n".join([*lines, ""])
