"""The serving benchmark and the soak count right, keep to their time, and lose nothing that was measured."""

import json
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.hf.generation_models import make_model
from tests.hf.serving.engine import batching, needs_serving

pytestmark = needs_serving


@pytest.fixture(autouse=True)
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[3] / "scripts"))


def test_figures():
    from serving_load import Times, figures

    times = [Times(0.0, [1.0, 2.0, 3.0]), Times(0.5, [2.5, 5.5]), Times(1.0, [])]
    found = figures(times, 10.0)
    assert found["requests"] == 3 and found["tokens_per_s"] == 0.5 and found["most_live"] == 2
    assert found["first_median"] == 2.0 and found["between_median"] == 1.0 and found["between_p99"] == 3.0
    assert found["between_mean"] == pytest.approx(5 / 3)
    assert figures([Times(0.0, [])], 1.0)["first_median"] is None


def test_one_ends_when_the_next_begins():
    from serving_load import Times, most_live

    assert most_live([Times(0, [1.0, 2.0]), Times(0, [2.0, 3.0]), Times(0, [4.0])]) == 2
    assert most_live([]) == 0


def test_arrivals():
    from serving_load import make_load

    load = make_load(200, 3, 5, 50_000, 4.0, seed=0)
    assert load == make_load(200, 3, 5, 50_000, 4.0, seed=0) and load.arrivals == sorted(load.arrivals)
    assert load.arrivals[0] == 0 and 40 < load.arrivals[-1] < 60  # 200 at 4 a second
    assert len({tuple(prompt) for prompt in load.prompts}) == 200
    assert not any(make_load(3, 3, 5, 50, None, seed=0).arrivals)


def test_a_part_that_fails_is_noted_and_the_next_has_the_time_that_is_left(tmp_path):
    from benchmark_serving import Parts

    path = tmp_path / "figures.json"
    parts, now = Parts({"rows": []}, 2, 1000.0, str(path)), time.perf_counter()

    def fail(deadline):
        assert 490 < deadline - now < 510
        raise MemoryError("no room")

    parts.run("load", fail, engine="sdpa")
    saved = json.loads(path.read_text())["rows"]
    assert saved == [{"part": "load", "engine": "sdpa", "failed": "MemoryError: no room", "peak_gib": None}]
    row = parts.run("live", lambda deadline: {"left": deadline - now})
    assert 980 < row["left"] < 1010 and json.loads(path.read_text())["rows"][1] == row


def test_a_load_stops_at_its_deadline_and_its_tokens_count():
    from serving_load import Session, make_load, run_load

    model = make_model("llama-topk")
    load = make_load(4, 9, 100_000, model.config.vocab_size, None, seed=0)
    with Session(model, "flash_dmattn", batching(num_blocks=3), 9) as session:
        row = run_load(session, load, time.perf_counter() + 4.0)
    assert (row["finished"], row["requests"], row["cut_off"]) == (0, 4, True) and 4.0 <= row["seconds"] < 60.0
    assert row["tokens_per_s"] > 0 and row["most_live"] == 3 and row["cache_gib"] > 0


def test_rows_whose_time_was_over_are_marked(monkeypatch, tmp_path):
    """One request that finished of 64 that were to come, 63 of which had not been sent."""
    from matplotlib.axes import Axes

    from serving_picture import draw, is_cut_off

    hollow, loglog = [], Axes.loglog

    def recorded(axis, *args, **options):
        if options.get("markerfacecolor") == "white":
            hollow.append(tuple(args[0]))
        return loglog(axis, *args, **options)

    figures = {"tokens_per_s": 3.0, "first_median": 1.0, "between_p99": 1.0, "between_median": 1.0}
    rows = [
        {
            "part": "load",
            "engine": "sdpa",
            "prompt": prompt,
            "load": load,
            "finished": done,
            "requests": done,
            **figures,
        }
        for prompt, load, done in ((2048, "all at once", 1), (8192, "all at once", 64), (2048, 0.8, 64))
    ]
    settings = {"requests": 64, "tokens": 2**20, "shape": "1b", "keep_window_size": 2048}
    assert [is_cut_off(row, settings) for row in rows] == [True, False, False]
    monkeypatch.setattr(Axes, "loglog", recorded)
    other = {"part": "engine", "engine": "flash_attention_2", "unavailable": "ImportError: no flash-attn"}
    report = {"rows": [other, *rows], "settings": settings, "environment": {"device": "cpu", "date": "today"}}
    draw(report, str(tmp_path / "picture.png"))
    assert hollow == [(2048,)] and (tmp_path / "picture.png").exists()


def test_an_engine_that_is_not_installed_has_a_reason():
    from benchmark_serving import why_unavailable

    model = make_model("llama-topk")
    assert why_unavailable(model, "sdpa") is None
    assert "Error: " in why_unavailable(model, "flash_attention_2")


def test_the_ledger_of_a_soak():
    from checks.soak_serving import Ledger, growth

    def ends(name, count):
        return SimpleNamespace(request_id=name, generated_tokens=[1] * count)

    ledger = Ledger(asked={"1": ([5], 2), "2": ([6], 3)}, cancelled={"3": ([7], 4)})
    ledger.take(ends("1", 2))
    ledger.take(ends("3", 4))
    assert (ledger.finished, ledger.finished_though_cancelled, ledger.tokens) == (2, 1, 6)
    assert set(ledger.asked) == {"2"} and not ledger.cancelled
    with pytest.raises(RuntimeError, match="request 1 ended twice"):
        ledger.take(ends("1", 2))
    with pytest.raises(RuntimeError, match="request 2 asked for 3 tokens, got 1"):
        ledger.take(ends("2", 1))
    samples = [9.0, 9.0, 5.0, 7.0, 9.0, 9.0, 9.0, 9.0, 8.0, 11.0]
    grown = {name: growth(name, samples) for name in ("allocated", "reserved", "resident")}
    assert grown == {"allocated": 3.0, "reserved": 4.0, "resident": 3.5}
