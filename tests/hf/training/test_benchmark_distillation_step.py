"""scripts/benchmark_distillation_step.py: a row for each stage, plain and compiled, and what was compiled."""

import json
import subprocess
import sys
from pathlib import Path

import torch

from ..cli_models import save_dense

SCRIPT = Path(__file__).resolve().parents[3] / "scripts" / "benchmark_distillation_step.py"
COMPILED_BY_AN_INTERPRETER = """
import runpy, sys
from flash_dmattn_hf.training import compiled_layers
compiled_layers.BACKEND = "aot_eager"
sys.path.insert(0, sys.argv[1].rpartition("/")[0])
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
SMALL = "--length 128 --batch-size 1 --keep-window-size 32 --steps 2 --profile --device cpu"


def test_both_stages_are_measured_with_and_without(tmp_path):
    save_dense(tmp_path / "dense")
    torch.save({"train": torch.randint(5, 60, (17000,), generator=torch.Generator().manual_seed(0))}, tmp_path / "t.pt")
    command = [sys.executable, "-W", "ignore", "-c", COMPILED_BY_AN_INTERPRETER, str(SCRIPT), "--model", "dense"]
    command += ["--tokens", "t.pt", "--output", "out/step.json", *SMALL.split()]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "out" / "step.json").read_text())
    rows = {(row["stage"], row["compile"]): row for row in report["rows"]}
    assert len(rows) == 4 and report["environment"]["device"]
    for (stage, compiles), row in rows.items():
        assert (row["graphs"] > 0) == compiles and row["graph_breaks"] == 0, stage
        assert row["milliseconds"] > 0 and row["launches"] > 0 and row["profile"]["launches"]
