"""The script that checks long generation finds no fault where there is none, and every fault that it names."""

from pathlib import Path

import pytest
import torch

from ..generation_models import left_padded_prompt, make_model

NEW = 40


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[3] / "scripts"))
    from checks import generation

    return generation


def check(script, kind="llama-sinks-local", dtype=torch.float64):
    model = make_model(kind, dtype=dtype)
    ids, mask = left_padded_prompt()
    return script.check(model, {"input_ids": ids, "attention_mask": mask}, NEW)


@pytest.mark.parametrize("kind", ["llama-topk", "llama-sinks-local", "llama-query-heads", "gpt2-mha"])
def test_float64_agrees(script, kind):
    row = check(script, kind)
    assert row["faults"] == [] and row["ids"] == 3 * NEW and row["prompt_tokens"] == [26, 21, 9]
    heads = 4 if kind in ("llama-query-heads", "gpt2-mha") else 2
    assert row["sets_compared"] == (NEW - 1) * 2 * 3 * heads
    assert row["largest_difference"] < 1e-6 and row["steps_of_other_sets_uncached"] == 0


def test_norms_are_exact_while_float64_is_checked(script):
    model = make_model("llama-topk")
    norm = model.model.norm
    torch.nn.init.normal_(norm.weight)
    states = torch.randn(3, 32, dtype=torch.float64)
    expected = torch.nn.functional.rms_norm(states, (32,), norm.weight, norm.variance_epsilon)
    with script.exact_norms(model):
        torch.testing.assert_close(norm(states), expected, rtol=1e-14, atol=1e-14)
    assert not torch.allclose(norm(states), expected, rtol=1e-12, atol=1e-12)


def test_float32_agrees_and_counts_near_ties(script):
    """Tokens of the tiny vocabulary come again and again, so that the first layer's importances tie."""
    row = check(script, dtype=torch.float32)
    assert row["faults"] == [] and row["clear_steps"] > 0 and row["steps_with_near_ties"] > 0
    assert row["clear_steps"] + row["steps_with_near_ties"] == 3 * (NEW - 1)


def test_near_ties_are_those_on_the_edge(script):
    """w = 16 with 4 sinks and 7 local tokens: 5 keys compete for a place."""
    from checks.recorded_cache import near_ties, recorded_cache

    model = make_model("llama-sinks-local", dtype=torch.float32)
    layer = recorded_cache(model, 30, 30).layers[0]
    layer.lazy_initialization(torch.zeros(1, 2, 1, 8), torch.zeros(1, 2, 1, 8))
    layer.num_steps.fill_(20)
    layer.lengths.fill_(20)
    values = torch.tensor([9.0, 9, 9, 9, 5, 3, 4, 1, 2, 0, 1 + 4e-7, 3 + 9e-7, 7, 8, 0, 0, 0, 0, 0, 0])
    layer.importances[0, :, :20] = values
    found = near_ties([layer], 8)[0, :, 0].tolist()
    expected = []
    for t in range(20):
        best = sorted(values[4 : max(t - 6, 4)].tolist(), reverse=True)
        is_near = len(best) > 5 and best[4] - best[5] < 8 * torch.finfo(torch.float32).eps * best[4]
        expected.append(2 * is_near)
    assert sum(expected) > 0 and found == expected


def test_keys_that_got_lost_are_found(script, monkeypatch):
    """A step that forgets a key changes sets and ids."""
    from checks.recorded_cache import RecordedLayer

    step = RecordedLayer.step

    def forget(self, *args, **options):
        out = step(self, *args, **options)
        if self.num_steps == 20:
            self.positions[:, :, 3] = -1
        return out

    monkeypatch.setattr(RecordedLayer, "step", forget)
    row = check(script)
    assert "visible sets" in row["faults"] and row["sets_that_differ"] > 0 and row["largest_difference"] > 1e-3


def test_other_logits_are_found(script, monkeypatch):
    """Logits that are off by more than the tolerance, in float32, are a fault."""
    monkeypatch.setattr(script, "TOLERANCE", 1e-9)
    faults = check(script, dtype=torch.float32)["faults"]
    assert faults == ["logits with the importances of the run", "logits of clear steps"]
