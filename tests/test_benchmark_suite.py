"""The suite says what moved, and the pages hold what the result files say."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
SCRIPTS = REPOSITORY / "scripts"
RESULTS = REPOSITORY / "docs" / "benchmarks"
GPU = {"device": "NVIDIA H200", "date": "2026-11-30", "commit": "abc"}
ROW = {"seqlen": 64, "engine": "cuda", "work": "forward", "milliseconds": 1.0, "useful_tflops": 9.0, "peak_mib": 5.0}


@pytest.fixture(autouse=True)
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))


def report(*rows, **settings):
    return {"environment": GPU, "settings": {"head_dim": 128, **settings}, "rows": list(rows)}


def test_what_moved_is_named_and_nothing_else():
    from benchmark_suite import compare_rows

    others = {**ROW, "work": "backward"}, {**ROW, "seqlen": 128}
    new = report({**ROW, "milliseconds": 1.04, "useful_tflops": 1.0, "peak_mib": 5.1}, {**others[0], "failed": "no"})
    assert compare_rows(report(ROW, *others), new, 3.0) == [
        "64 cuda forward milliseconds: 1 before, 1.04 now, +4.0 %",
        "64 cuda backward: worked before, no now",
    ]
    assert compare_rows(report(ROW, *others), new, 5.0) == ["64 cuda backward: worked before, no now"]


def test_figures_are_compared_only_with_their_like(tmp_path):
    from benchmark_suite import compare_files

    path, committed = tmp_path / "attention.json", tmp_path / "attention_h200.json"
    path.write_text(json.dumps(report(ROW, seqlens=[64])))
    (missing,) = compare_files("attention", path, tmp_path, 3.0)
    assert missing == "attention: there is no attention_h200.json to compare with"
    committed.write_text(json.dumps(report({**ROW, "milliseconds": 2.0}, seqlens=[32, 64])))
    assert compare_files("attention", path, tmp_path, 3.0) == [
        "attention: 64 cuda forward milliseconds: 2 before, 1 now, -50.0 %"
    ]
    committed.write_text(json.dumps(report(ROW, head_dim=64)))
    (differing,) = compare_files("attention", path, tmp_path, 3.0)
    assert differing.endswith("whose settings differ: head_dim")


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA L40S", "l40s"),
        ("AMD EPYC 9654, 1 threads", "cpu"),
    ],
)
def test_result_files_are_named_by_gpu(device, name):
    from benchmark_report import gpu_name

    assert gpu_name(device) == name


def test_every_part_is_a_script_and_has_figures_and_a_table():
    from benchmark_suite import PARTS
    from results_tables import PARTS as TABLES

    assert {part.name for part in PARTS} == {name for names in TABLES.values() for name in names}
    for part in PARTS:
        assert (SCRIPTS / part.arguments.split()[0]).exists()


def test_the_suite_runs_on_a_cpu(tmp_path):
    command = [sys.executable, SCRIPTS / "benchmark_suite.py", "--quick", "--parts", "selection", "decode"]
    done = subprocess.run([*command, "--folder", tmp_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((tmp_path / "selection.json").read_text())["rows"]
    assert "selection: there is no selection_cpu.json" in done.stdout and "left out: decode" in done.stdout


def test_the_suite_refuses_a_machine_without_a_gpu_and_keeps_the_last_results(tmp_path, monkeypatch, capsys):
    import benchmark_suite

    old = tmp_path / "attention.json"
    old.write_text("{}")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["benchmark_suite.py", "--folder", str(tmp_path)])
    with pytest.raises(SystemExit):
        benchmark_suite.main()
    assert "a CUDA GPU is needed, or --quick" in capsys.readouterr().err and old.exists()


@pytest.mark.parametrize("page", ["README.md", "docs/results.md"])
def test_the_pages_hold_what_the_result_files_say(page):
    from results_tables import PARTS
    from write_results import BLOCK, rewrite

    text = (REPOSITORY / page).read_text()
    blocks = [name for _, name, *_ in BLOCK.findall(text)]
    assert set(blocks) == ({"summary"} if page == "README.md" else PARTS.keys() - {"summary"})
    assert rewrite(text, RESULTS, "docs/" if page == "README.md" else "") == text, "run scripts/write_results.py"


def test_a_suite_is_taken_over_with_the_name_of_its_gpu(tmp_path):
    from write_results import rewrite, take_over

    results, suite = tmp_path / "results", tmp_path / "suite"
    results.mkdir()
    suite.mkdir()
    shutil.copy(RESULTS / "attention_h100.json", results)
    row = {**ROW, "engine": "flash_dmattn", "host_microseconds": 20.0}
    both = report(row, {**row, "engine": "cudnn", "milliseconds": 2.0}, json="/a/path/of/that/machine.json")
    (suite / "host_time.json").write_text(json.dumps(both))
    gpu = take_over(suite, results)
    assert json.loads((results / "host_time_h200.json").read_text()) == report(*both["rows"])
    page = "".join(
        f"<!-- figures: {name} {old} -->\n<!-- end of figures -->\n"
        for name, old in (("attention", "h100"), ("host_time", "none"), ("model", "none"))
    )
    written = rewrite(page, results, "", gpu)
    assert "figures: attention h100" in written and "figures: host_time h200" in written
    assert "| 64 | forward | 20 | 20 | 1.0 | 2.0 | 2.0x |" in written
    assert "<!-- figures: model none -->\nNot measured yet.\n" in written
    (suite / "host_time.json").write_text(json.dumps({**report(row), "environment": {**GPU, "device": "a CPU"}}))
    with pytest.raises(SystemExit, match="one GPU, not of cpu"):
        take_over(suite, results)
