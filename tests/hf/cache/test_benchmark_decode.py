"""The decoding benchmark fills its caches as a context would, and its steps go on from there."""

import argparse
from pathlib import Path

import pytest
import torch

from flash_dmattn_hf import DynamicMaskCache

SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "vocab_size": 99,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
ARGUMENTS = argparse.Namespace(keep_window_size=16, contexts=[8, 64], steps=3, slot_dtype=None)


@pytest.fixture
def benchmark(monkeypatch):
    """The script, on a CPU and without graphs."""
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[3] / "scripts"))
    import benchmark_decode

    monkeypatch.setattr(benchmark_decode, "DEVICE", "cpu")
    monkeypatch.setattr(benchmark_decode, "capture", lambda function: function)
    monkeypatch.setattr(benchmark_decode, "CapturedForward", lambda model: model)
    return benchmark_decode


@pytest.mark.parametrize("context", [3, 16, 17, 40, 2**20])
def test_the_positions_that_a_context_leaves(benchmark, context):
    kept = benchmark.kept_positions(16, context, num_sink_tokens=4, local_window_size=9).tolist()
    real = [position for position in kept if position >= 0]
    assert len(kept) == 16 and len(set(real)) == len(real) == min(16, context)
    assert max(real) < context and set(real) >= {*range(min(4, context)), *range(max(0, context - 9), context)}


@pytest.mark.parametrize("context", [8, 64])
@pytest.mark.parametrize("engine", ["flash_dmattn", "flash_dmattn-eager", "dense-dynamic", "dense-static"])
@torch.no_grad()
def test_a_step_appends_one_token(benchmark, engine, context, monkeypatch):
    model = benchmark.make_model(ARGUMENTS, SHAPE)
    model.set_attn_implementation("flash_dmattn" if engine.startswith("flash") else "sdpa")
    caches = []
    name = "filled_slots" if engine.startswith("flash") else "filled_dense"
    fill = getattr(benchmark, name)
    monkeypatch.setattr(benchmark, name, lambda *args, **options: caches.append(fill(*args, **options)) or caches[0])
    step, cache_bytes, refill = benchmark.make_step(ARGUMENTS, model, engine, 2, context)
    step()
    step()
    assert int(caches[0].get_seq_length()) == context + 2
    if isinstance(caches[0], DynamicMaskCache):
        assert cache_bytes == caches[0].nbytes and caches[0].max_keys == min(16, context + 2)
        assert caches[0].mask_layers[0].lengths.unique().tolist() == [context + 2]
        addresses = caches[0].addresses()
        refill(40)
        step()
        assert caches[0].get_seq_length() == 41 and caches[0].addresses() == addresses
        assert caches[0].mask_layers[0].positions.max() == 40


@pytest.mark.parametrize("slot_dtype", [None, "float8_e4m3fn"])
@torch.no_grad()
def test_its_check_accepts_right_steps_and_no_others(benchmark, slot_dtype, monkeypatch):
    arguments = argparse.Namespace(**{**vars(ARGUMENTS), "slot_dtype": slot_dtype})
    benchmark.check(arguments, SHAPE)
    cache = benchmark.filled_slots(arguments, benchmark.make_model(arguments, SHAPE), 2, 40, static=True)
    assert cache.mask_layers[0].keys.float().std() > 0.5 and cache.mask_layers[0].positions.max() == 39
    right = benchmark.step_logits
    monkeypatch.setattr(benchmark, "step_logits", lambda *inputs: right(*inputs) + (inputs[1] is not inputs[2]))
    with pytest.raises(RuntimeError, match="steps are wrong"):
        benchmark.check(arguments, SHAPE)


@torch.no_grad()
def test_ours_is_measured_at_all_contexts_in_turns(benchmark, monkeypatch):
    """Dense engines have one context at a time."""
    calls = []
    for name in ("empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 2**30)
    monkeypatch.setattr(benchmark, "clocked", lambda step: calls.append(step()) or float(len(calls)))
    model = benchmark.make_model(ARGUMENTS, SHAPE)
    rows = list(benchmark.measure(ARGUMENTS, model, "flash_dmattn-eager", 2))
    assert [row["context"] for row in rows] == [8, 64] and [row["milliseconds"] for row in rows] == [4.0, 5.0]
    assert rows[0]["cache_bytes"] == rows[1]["cache_bytes"] and rows[0]["tokens_per_second"] == 500
    rows = list(benchmark.measure(ARGUMENTS, model, "dense-dynamic", 2))
    assert [row["context"] for row in rows] == [8, 64] and rows[0]["cache_bytes"] < rows[1]["cache_bytes"]


def test_the_picture(benchmark, tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is an optional dependency")
    row = {"shape": "1b", "batch": 1, "engine": "flash_dmattn", "tokens_per_second": 9.0, "cache_bytes": 5.0}
    report = {
        "environment": {"device": "a GPU", "date": "today"},
        "settings": {"shapes": ["1b"], "batches": [1], "engines": ["flash_dmattn"], "keep_window_size": 16},
        "rows": [{**row, "context": 8}, {**row, "context": 64}, {"shape": "1b", "batch": 1, "failed": "out of memory"}],
    }
    benchmark.draw(str(tmp_path / "picture.png"), report)
    assert (tmp_path / "picture.png").stat().st_size > 0
