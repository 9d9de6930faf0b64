"""scripts/benchmark_parallel.py goes on after a part that fails, and what is computed from its rows is as written."""

import sys
import time
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parents[3] / "scripts"

REPORT = {
    "environment": {"device": "a device", "date": "today"},
    "settings": {"keep_window_size": 16},
    "memory_gib": 100.0,
    "rows": [
        {"num_gpus": 1, "engine": "flash_dmattn", "tokens": 1000, "milliseconds": 900.0, "peak_gib": 3.0},
        {"num_gpus": 1, "engine": "flash_dmattn", "tokens": 2000, "milliseconds": 2000.0, "peak_gib": 5.0},
        {"num_gpus": 2, "engine": "exchange", "tokens": 0, "exchange_milliseconds": 1.0, "bytes_per_layer": 4000}
        | {"gradient_sum_milliseconds": 10.0, "gradient_bytes": 10**6},
        {"num_gpus": 2, "engine": "flash_dmattn", "tokens": 4000, "milliseconds": 2100.0, "peak_gib": 5.0}
        | {"exchanges_per_step": 4},
        {"num_gpus": 2, "engine": "sdpa", "tokens": 1000, "milliseconds": 1000.0, "peak_gib": 4.0},
        {"num_gpus": 2, "engine": "sdpa", "tokens": 2000, "milliseconds": 3000.0, "peak_gib": 4.0},
        {"num_gpus": 2, "engine": "flash_dmattn", "tokens": 8000, "failed": "OutOfMemoryError"},
    ],
}
"""One GPU takes a millisecond a token, two pass 4 MB a second, and the ring takes N + N^2 / 1000 ms of a GPU."""
for row in REPORT["rows"]:
    row["tokens_per_second_per_gpu"] = 1000.0


@pytest.fixture
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    yield
    for name in ("benchmark_parallel", "parallel_steps", "parallel_picture", "parallel_model", "benchmark_report"):
        sys.modules.pop(name, None)


def test_steps_on_more_gpus_are_computed_from_the_parts(scripts, capsys, tmp_path):
    pytest.importorskip("matplotlib")
    from parallel_model import NETWORK_BYTES_PER_SECOND, model_of
    from parallel_picture import draw, print_compared, print_computed

    model = model_of(REPORT)
    exchanges, gradients = 1.5 * 4 * 3 * 4000 / 4e6, 2 * 3 / 4 * 1e6 / 1e8
    assert model.seconds(8000, 4) == pytest.approx(2.0 + exchanges + gradients)
    beyond = (1.5 * 4 * 63 * 4000 + 2 * 63 / 64 * 1e6) / NETWORK_BYTES_PER_SECOND
    assert model.seconds(64000, 64) == pytest.approx(1.0 + beyond)
    assert model.ring_seconds(4000, 2) == pytest.approx(10.0)
    assert model.peak_gib(8000, 4) == pytest.approx(5.0)
    draw(str(tmp_path / "picture.png"), REPORT)
    print_computed(model)
    assert (tmp_path / "picture.png").stat().st_size and "computed" in capsys.readouterr().out
    print_compared(model, REPORT)
    assert "| 2 | 4000 | 2.10 | 2.02 | +4% measured |" in capsys.readouterr().out
    assert model_of({**REPORT, "rows": REPORT["rows"][:2]}) is None


def test_every_number_of_gpus_has_a_colour_of_its_own(scripts):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    from parallel_model import model_of
    from parallel_picture import draw_computed, draw_measured

    on_four = {**REPORT["rows"][3], "num_gpus": 4}
    more = on_four, {**on_four, "tokens": 8000}, {**on_four, "engine": "sdpa"}
    report = {**REPORT, "rows": [*REPORT["rows"], *more]}
    figure, (measured, computed) = pyplot.subplots(2, 2)
    draw_measured(measured, report)
    draw_computed(computed, model_of(report), report)
    pyplot.close(figure)
    by_gpus, labels = {}, []
    for axis in (*measured, *computed):
        found = [line for line in axis.lines if "GPU" in line.get_label() and "that a GPU" not in line.get_label()]
        labels.append([line.get_label() for line in found])
        for line in found:
            by_gpus.setdefault(line.get_label().split()[-2], set()).add(line.get_color())
    assert set(by_gpus) == {"1", "2", "4", "8", "64"} and all(len(colours) == 1 for colours in by_gpus.values())
    assert len(set.union(*by_gpus.values())) == len(by_gpus)
    ours = [f"flash_dmattn, {count}" for count in ("1 GPU", "2 GPUs", "4 GPUs")]
    assert labels[0] == labels[1] == [*ours, "sdpa, 2 GPUs", "sdpa, 4 GPUs"]
    assert all(len(set(names)) == len(names) for names in labels)


@pytest.mark.slow
def test_a_part_that_fails_does_not_end_the_others(scripts, tmp_path):
    from benchmark_parallel import QUICK, rows_of_stage

    settings = {**QUICK, "device": "cpu", "seed": 0, "runs": 1, "minutes": 5, "part_seconds": 300}
    settings["profile"] = str(tmp_path)
    parts = [("flash_dmattn", 127), ("exchange", 0), ("flash_dmattn", 128)]
    failed, exchange, row = rows_of_stage(2, parts, settings, time.monotonic() + 600)
    assert "multiple of the 2 ranks, got 127" in failed["failed"] and failed["tokens"] == 127
    assert exchange["bytes_per_layer"] == 16 * 2 * (2 * 8 * 2 + 8)
    assert row["bytes_per_layer"] == exchange["bytes_per_layer"] and row["milliseconds"] > 0
    assert {path.name for path in tmp_path.iterdir()} == {f"flash_dmattn_128_rank_{rank}_of_2.txt" for rank in (0, 1)}
    slow = {**settings, "part_seconds": 0.1}
    (late,) = rows_of_stage(2, parts[2:], slow, time.monotonic() + 600)
    assert late["failed"].startswith("TimeoutError: flash_dmattn with 128 tokens took too long")
    (over,) = rows_of_stage(2, parts[2:], settings, time.monotonic() - 1)
    assert over["failed"] == "TimeoutError: the 5 minutes were over"


def test_processes_that_fail_to_end_add_no_row(scripts, monkeypatch, capsys):
    import benchmark_parallel

    def run_processes(num_gpus, parts, settings, deadline):
        yield from ({"engine": engine, "tokens": tokens} for engine, tokens in parts)
        raise RuntimeError("process 1 was killed")

    monkeypatch.setattr(benchmark_parallel, "run_processes", run_processes)
    rows = [*benchmark_parallel.rows_of_stage(2, [("exchange", 0), ("sdpa", 8)], {}, time.monotonic() + 60)]
    assert rows == [{"engine": "exchange", "tokens": 0}, {"engine": "sdpa", "tokens": 8}]
    assert "process 1 was killed" in capsys.readouterr().err
