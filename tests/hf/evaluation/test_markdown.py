"""The tables in Markdown: shares of the dense model's recall, and what was not measured is left out."""

import pytest

from flash_dmattn_hf.evaluation.markdown import all_right_by, markdown_tables, share_of_recall
from flash_dmattn_hf.evaluation.rows import TRAINED_WINDOW
from flash_dmattn_hf.evaluation.suite import add_shares_of_gap


def cell(task, depth, num_prompts, all_right):
    shares = {"tokens": all_right, "answers": all_right, "all_right": all_right}
    return {"task": task, "context": 100, "depth": depth, "num_prompts": num_prompts, **shares}


def row(mask, kind, window, loss, *shares):
    recall = [cell("pass_key", 10, 1, shares[0]), cell("pass_key", 90, 3, shares[1]), cell("words", None, 4, shares[2])]
    facts = {"mask": mask, "kind": kind, "keep_window_size": window, "loss": loss, "recall": recall}
    return {**facts, "perplexity": 9.0, "kld": 0.1, "top1": 0.5}


@pytest.fixture
def rows():
    found = [
        row("dense", "dense", None, 2.0, 1.0, 1.0, 0.5),
        row("window", "sinks + window", 8, 3.0, 0.0, 1.0, 0.0),
        row("control", TRAINED_WINDOW, 8, 2.4, 0.0, 1.0, 0.25),
        row("ours", "importance", 8, 2.1, 1.0, 1.0, 0.25),
    ]
    add_shares_of_gap(found)
    return found


def test_prompts_count_alike(rows):
    assert all_right_by(rows[1], "task") == {"pass_key": 0.75, "words": 0.0}
    assert all_right_by(rows[1], "depth") == {10: 0.0, 90: 1.0}
    assert share_of_recall(rows[3], rows[0]) == pytest.approx((1 + 3 + 1) / (1 + 3 + 2))


def test_the_gap_that_the_control_leaves_is_told_apart(rows):
    assert rows[3]["share_of_gap"] == pytest.approx(0.9)
    assert rows[3]["share_of_control_gap"] == pytest.approx(0.75)
    assert "share_of_control_gap" not in rows[0]


def test_tables_have_a_line_for_every_row(rows):
    rows.append({**row("peer", "peer", 8, None, 0.0, 1.0, 0.0), "perplexity": None})
    agreement, tasks, depths = markdown_tables(rows).split("\n\n")
    assert "| ours | 9.000 | 90.0% | 75.0% | 0.1000 | 50.0% | 83.3% |" in agreement
    assert "peer" not in agreement
    assert "| ours | 1.00 (100%) | 0.25 (50%) |" in tasks
    assert "| peer | 0.00 (0%) | 1.00 (100%) |" in depths


def test_a_dense_model_that_finds_nothing_has_no_share(rows):
    nothing = row("dense", "dense", None, 2.0, 0.0, 0.0, 0.0)
    assert share_of_recall(rows[3], nothing) is None
    assert "%" not in markdown_tables([nothing]).split("\n\n")[1]
