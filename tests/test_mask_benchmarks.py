"""The benchmarks of masks, gradients, host time and recall run on a CPU, small, and write what they say they write."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"
CONFIGS = sorted((SCRIPTS.parent / "configs" / "mqar").glob("*.yaml"))
SMALL_MQAR = ["--seqlen", "32", "--num-pairs", "4", "--num-symbols", "8", "--width", "16", "--batch-size", "4"]


def run(script, folder, *arguments):
    target = folder / "figures.json"
    command = [sys.executable, "-W", "ignore", str(SCRIPTS / script), *arguments, "--json", str(target)]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(target.read_text()), done.stdout


def test_forward_equivalence(tmp_path):
    figures, said = run("benchmark_forward_equivalence.py", tmp_path, "--test-type", "reference", "--verbose")
    assert {row["engine"] for row in figures["rows"]} == {"reference"} and all(row["passed"] for row in figures["rows"])
    assert said.count("passed") > len(figures["rows"])


def test_gradients(tmp_path):
    figures, _ = run("benchmark_grad.py", tmp_path, "--test-type", "reference", "--runs", "1", "--warmup", "0")
    assert {row["engine"] for row in figures["rows"]} == {"sdpa", "reference"}
    assert all(max(row["errors"].values()) < 1e-4 for row in figures["rows"])


def test_forward_performance(tmp_path):
    shape = ["--seqlens", "128", "--num-heads", "4", "--num-kv-heads", "2", "--keep-window-size", "32"]
    figures, _ = run("benchmark_forward_performance.py", tmp_path, "--test-type", "sdpa-vs-flex", "--backward", *shape)
    assert {row["engine"] for row in figures["rows"]} == {"sdpa", "flex", "intervals", "create_mask"}
    assert all(row["milliseconds"] > 0 for row in figures["rows"])
    assert {row["mask"] for row in figures["rows"]} == {"random", "blocks", "topk", "key", "full"}


def test_host_time(tmp_path):
    shape = ["--num-heads", "4", "--num-kv-heads", "2", "--head-dim", "16", "--keep-window-size", "32"]
    run_options = ["--device", "cpu", "--seqlens", "32", "64", "--calls", "1"]
    figures, _ = run("benchmark_host_time.py", tmp_path, *run_options, *shape)
    works = {"forward", "both", "decode"}
    assert {(row["engine"], row["work"]) for row in figures["rows"]} == {
        *((engine, work) for engine in ("flash_dmattn", "cudnn") for work in works),
        ("flash_dmattn", "long way"),
    }
    assert all(row["host_microseconds"] > 0 and row["milliseconds"] > 0 for row in figures["rows"])


def test_recall(tmp_path):
    figures, said = run(
        "benchmark_mqar.py",
        tmp_path,
        *("--config", str(CONFIGS[0]), *SMALL_MQAR, "--first-seqlens", "16", "--schedules", "scratch", "converted"),
        *("--steps", "2", "--seeds", "2", "--learning-rates", "1e-3"),
    )
    assert len(CONFIGS) >= 3
    for config in CONFIGS:
        assert set(yaml.safe_load(config.read_text())) <= set(figures["settings"]), config.name
    named = [(row["variant"], row["schedule"]) for row in figures["table"]]
    assert len(named) == len(set(named)) == 1 + 2 * 4  # dense attention has one schedule
    assert len(figures["calibration_r2"]["layer 1"]) == 2 * 2
    assert all(math.isfinite(row["train_loss"]) for row in figures["rows"])
    assert f"{len(figures['rows'])} models" in said


def test_an_engine_that_is_not_there_is_an_error(tmp_path):
    command = [sys.executable, str(SCRIPTS / "benchmark_grad.py"), "--test-type", "cuda"]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 1 and "no GPU backend" in done.stdout


def test_models_that_train_side_by_side_do_not_touch_each_other(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    from mqar.calibration import calibrate
    from mqar.models import Models, Optimizer
    from mqar.task import SCHEDULES, VARIANTS, Task, make_runs
    from mqar.training import losses_of

    task = Task(32, 4, 8, 8, 8)
    all_runs = make_runs(VARIANTS, SCHEDULES, 2, [1e-2])

    def train(runs):
        models = Models(runs, task, 16, 1, 8, "cpu")
        optimizer = Optimizer(models, 4)
        generator = torch.Generator().manual_seed(3)
        parameters = list(models.parameters.values())
        for step in range(4):
            if step == 2:
                places = [place for place, run in enumerate(runs) if run.name == "dma+window converted"]
                calibrate(models, places, task.sample(8, generator, mixed=True)[0])
            models.advance(step / 4, task.seqlen)
            losses = losses_of(models, *task.sample(4, generator, mixed=True))
            optimizer.step(torch.autograd.grad(losses.sum(), parameters, allow_unused=True, materialize_grads=True))
        return losses

    runs = [run for run in all_runs if run.name == "dma converted"]
    one, other = Models(runs, task, 16, 1, 8, "cpu"), Models(runs, task, 16, 1, 8, "cpu")
    one.advance(0.0, task.seqlen)
    other.advance(1.0, task.seqlen)
    tokens, _ = task.sample(8, torch.Generator().manual_seed(4), mixed=True)
    assert calibrate(one, [0, 1], tokens) == calibrate(other, [0, 1], tokens)  # both on dense attention

    together = train(all_runs)
    names = [run.name for run in all_runs]
    for name in ("dense", "dma+window", "sinks+window", "sliding-window converted", "dma+window converted"):
        place = names.index(name) + 1
        torch.testing.assert_close(together[place : place + 1], train(all_runs[place : place + 1]))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU: only there steps are captured")
def test_a_captured_step_trains_as_one_that_is_launched(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    from mqar.models import Models, Optimizer
    from mqar.task import SCHEDULES, VARIANTS, Task, make_runs
    from mqar.training import Step

    tasks = [Task(64, 8, 16, 16, 16), Task(128, 16, 16, 16, 16)]
    runs = make_runs(VARIANTS, SCHEDULES, 1, [1e-3])

    def train(method):
        models = Models(runs, tasks[1], 64, 1, 32, "cuda")
        step = Step(models, Optimizer(models, 12))
        generator, losses = torch.Generator("cuda").manual_seed(3), []
        for number in range(12):
            task = tasks[number // 4 % 2]
            models.advance(number / 12, task.seqlen)
            losses.append(getattr(step, method)(*task.sample(4, generator, mixed=True)))
        return torch.stack(losses)

    replayed, launched = train("__call__"), train("_step")
    assert (replayed[0] != replayed[-1]).all()
    torch.testing.assert_close(replayed, launched, rtol=1e-2, atol=1e-2)
