"""Rows of several models as tables in Markdown: agreement with dense, and recall as a share of the dense model's."""

from collections.abc import Iterable


def markdown_tables(rows: list[dict]) -> str:
    """Returns three tables: agreement, recall by task, and recall by depth over the tasks that have depths.

    rows: as of `recall_suite`, one of them of the kind "dense". A row whose loss is None, which only recall was
    measured of, is left out of the first table. Recall is the share of prompts with all answers right; in brackets that
    as a share of the dense model's.
    """
    dense = next(row for row in rows if row["kind"] == "dense")
    parts = [_agreement(rows, dense)]
    for title, name in (("recall by task", "task"), ("recall by depth (%)", "depth")):
        expected = all_right_by(dense, name)
        if expected:
            found = [(row["mask"], all_right_by(row, name)) for row in rows]
            lines = [[mask, *(_recall(part[key], expected[key]) for key in expected)] for mask, part in found]
            parts.append(_table([title, *map(str, expected)], lines))
    return "\n\n".join(parts)


def all_right_by(row: dict, name: str) -> dict[str | int, float]:
    """Returns the share of prompts with all answers right for each value of `name`, "task", "context" or "depth".

    Prompts without a depth have no part in those by depth.
    """
    values = dict.fromkeys(cell[name] for cell in row["recall"] if cell[name] is not None)
    return {value: _all_right([cell for cell in row["recall"] if cell[name] == value]) for value in values}


def share_of_recall(row: dict, dense: dict) -> float | None:
    """Returns the prompts that a row gets all right as a share of those of the dense row; None if there are none.

    row, dense: as of `recall_suite`, asked the same prompts.
    """
    expected = _all_right(dense["recall"]) if dense["recall"] else 0.0
    return _all_right(row["recall"]) / expected if expected else None


def _all_right(cells: list[dict]) -> float:
    right = sum(cell["all_right"] * cell["num_prompts"] for cell in cells)
    return right / sum(cell["num_prompts"] for cell in cells)


def _agreement(rows: list[dict], dense: dict) -> str:
    lines = []
    for row in rows:
        if row["loss"] is not None:
            gaps = [_percent(row.get(name)) for name in ("share_of_gap", "share_of_control_gap")]
            figures = [f"{row['perplexity']:.3f}", *gaps, f"{row['kld']:.4f}", f"{row['top1']:.1%}"]
            lines.append([row["mask"], *figures, _percent(share_of_recall(row, dense))])
    titles = ["mask", "perplexity", "gap closed", "gap of the trained window closed", "KLD", "top-1"]
    return _table([*titles, "recall, share of dense"], lines)


def _recall(share: float, dense: float) -> str:
    return f"{share:.2f} ({share / dense:.0%})" if dense else f"{share:.2f}"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"


def _table(titles: list[str], lines: Iterable[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in (titles, ["---"] * len(titles), *lines))
