"""The results of the recall suite as text."""

from flash_dmattn_hf.evaluation.recall import RecallCell, over_depths


def tables(rows: list[dict]) -> str:
    """Returns two tables: agreement with dense, and recall by task and context if it was measured.

    rows: from `recall_suite`.
    """
    agreement = _agreement_table(rows)
    return f"{agreement}\n\n{_recall_table(rows)}" if rows[0]["recall"] else agreement


def merged_cells(row: dict) -> list[RecallCell]:
    """The recall cells of a row, one per task and context."""
    return over_depths([RecallCell(**cell) for cell in row["recall"]])


def _agreement_table(rows: list[dict]) -> str:
    width = max(len(row["mask"]) for row in rows)
    lines = [f"{'mask':{width}}{'cache MiB':>12}{'perplexity':>12}{'KLD':>10}{'top-1':>9}{'gap closed':>12}"]
    for row in rows:
        gap = "-" if row["share_of_gap"] is None else f"{row['share_of_gap']:.1%}"
        lines.append(
            f"{row['mask']:{width}}{row['cache_bytes'] / 2**20:12.2f}{row['perplexity']:12.3f}{row['kld']:10.4f}"
            f"{row['top1']:9.1%}{gap:>12}"
        )
    return "\n".join(lines)


def _recall_table(rows: list[dict]) -> str:
    cells = {row["mask"]: {(cell.task, cell.context): cell for cell in merged_cells(row)} for row in rows}
    places = next(iter(cells.values()))
    tasks, contexts = (list(dict.fromkeys(place[part] for place in places)) for part in (0, 1))
    generated = next(iter(places.values())).tokens is None
    width, task_width = (max(map(len, names)) for names in (cells, tasks))
    share = "answers" if generated else "answer tokens"
    lines = [
        f"recall: share of {share} right / of prompts with all answers right ("
        + ("generated)" if generated else "teacher-forced)"),
        f"{'task':{task_width}}  {'mask':{width}}" + "".join(f"{f'N = {context}':>16}" for context in contexts),
    ]
    for task in tasks:
        for mask, found in cells.items():
            line = f"{task:{task_width}}  {mask:{width}}"
            for context in contexts:
                cell = found[task, context]
                first = cell.answers if generated else cell.tokens
                line += f"{f'{first:.2f} / {cell.all_right:.2f}':>16}"
            lines.append(line)
    return "\n".join(lines)
