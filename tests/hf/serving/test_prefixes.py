"""Prompts that begin alike: the first leaves a snapshot of w slots, the others start from it, with the same results."""

import pytest
import torch

from flash_dmattn_hf.serving.prefixes import Prefixes
from tests.hf.generation_models import make_model
from tests.hf.serving.engine import Engine, alone, needs_serving
from tests.hf.serving.test_generate_batch import make_prompts

pytestmark = needs_serving

SYSTEM, *QUESTIONS = make_prompts((41, 3, 9, 1, 6), seed=3)
PROMPTS = [SYSTEM + question for question in QUESTIONS]
SHARED = 40
"""The longest multiple of a page of 4 tokens within the common prefix."""


def check_results(engine, names):
    for name in names:
        assert engine.results[name].generated_tokens == alone(engine.model, PROMPTS[int(name)], 5), name


@pytest.mark.parametrize("kind", ["llama-sinks-local", "llama-topk", "qwen2-sliding-below-w"])
def test_prompts_that_come_together(kind):
    """One of them is prefilled from its beginning, the rest wait until its snapshot is there, and copy it."""
    engine = Engine(make_model(kind), num_blocks=8)
    for number, prompt in enumerate(PROMPTS):
        engine.add(str(number), prompt, 5)
    engine.run()
    check_results(engine, map(str, range(4)))
    assert sum(before == 0 for batch in engine.batches for _, before, _ in batch) == 1
    assert sum(before == SHARED and new > 0 for batch in engine.batches for _, before, new in batch) == 4
    assert [tokens[1:] for tokens in engine.batches[0]] == [(0, 24)] and engine.batches[1][0][1:] == (24, SHARED - 24)
    assert list(engine.cache.rows.snapshots.values()) and not engine.cache.rows.held


def test_prompts_that_come_later():
    """Nobody knew that the first begins like others; the second leaves the snapshot, the third starts from it."""
    engine = Engine(make_model("llama-sinks-local"))
    starts = []
    for number in range(3):
        num_before = len(engine.batches)
        engine.add(str(number), PROMPTS[number], 5)
        engine.run()
        starts.append(engine.batches[num_before][0][1])
        check_results(engine, [str(number)])
    assert starts == [0, 0, SHARED]


def test_a_request_that_is_given_the_row_of_its_own_snapshot():
    engine = Engine(make_model("llama-sinks-local"), num_blocks=2)
    for number in (0, 1):
        engine.add(str(number), PROMPTS[number], 5)
    engine.run()
    check_results(engine, ["0", "1"])
    assert sum(before == SHARED for batch in engine.batches for _, before, _ in batch) == 2  # the second, too
    assert not engine.cache.rows.snapshots and engine.cache.rows.num_available == 2


def test_a_snapshot_gives_its_row_to_a_request():
    engine = Engine(make_model("llama-sinks-local"), num_blocks=3)
    for number in (0, 1):
        engine.add(str(number), PROMPTS[number], 5)
    engine.run()
    assert len(engine.cache.rows.snapshots) == 1
    others = make_prompts((7, 8, 9), seed=9)
    for number, prompt in enumerate(others):
        engine.add(f"other{number}", prompt, 5)
    engine.run()
    for number, prompt in enumerate(others):
        assert engine.results[f"other{number}"].generated_tokens == alone(engine.model, prompt, 5)
    assert not engine.cache.rows.snapshots and engine.cache.rows.num_available == 3


def test_a_cancelled_owner_does_not_keep_others_waiting():
    engine = Engine(make_model("llama-sinks-local"))
    for number in (0, 1):
        engine.add(str(number), PROMPTS[number], 5)
    engine.step()
    engine.manager.cancel_request("0")
    engine.run()
    check_results(engine, ["1"])
    assert set(engine.results) == {"1"}


def test_a_request_leaves_all_snapshots_that_it_owns_and_gives_up_those_it_has_passed():
    prefixes, prompt = Prefixes(4), list(range(13))
    prefixes.add("owner", prompt)
    prefixes.add("short", prompt[:9])
    assert prefixes.may_start("owner", {})  # it is to leave a snapshot at 8
    prefixes.add("long", prompt)
    assert prefixes.may_start("owner", {})  # and now one at 12
    assert not prefixes.may_start("short", {}) and not prefixes.may_start("long", {})
    assert prefixes.end_of("owner", 5) == 8
    prefixes.arrive("owner", 8)
    assert prefixes.end_of("owner", 8) == 12
    assert prefixes.end_of("owner", 12) is None
    assert prefixes.may_start("long", {}) and prefixes.end_of("long", 0) == 12


def test_a_prefix_is_named_by_a_wide_digest_of_all_its_tokens():
    """A snapshot of another prompt must not be found, not even by one who looks for a collision."""
    prefixes, names = Prefixes(4), set()
    for number in range(9):
        name = str(number)
        prefixes.add(name, [*range(number), 100 + number, *range(number + 1, 9)])
        names.add(prefixes.longest_of(name, Everything())[1])
    assert len(names) == 9 and all(len(name) == 32 for name in names)


class Everything:
    def __contains__(self, name) -> bool:
        return True


def test_without_sharing_everything_is_prefilled():
    engine = Engine(make_model("llama-topk"), allow_block_sharing=False)
    for number in (0, 1):
        engine.add(str(number), PROMPTS[number], 5)
    engine.run()
    check_results(engine, ["0", "1"])
    assert not engine.cache.rows.snapshots


def test_snapshots_go_with_their_session():
    """The weights of the next one may be others."""
    engine = Engine(make_model("llama-topk"))
    for number in (0, 1):
        engine.add(str(number), PROMPTS[number], 5)
    engine.run()
    assert len(engine.cache.rows.snapshots) == 1
    engine.processor.reset()
    assert engine.cache.rows.num_available == engine.cache.num_blocks and not engine.cache.rows.snapshots
    with torch.no_grad():
        for parameter in engine.model.model.layers.parameters():
            parameter.mul_(-1.5)
    engine.add("2", PROMPTS[2], 5)
    engine.run()
    check_results(engine, ["2"])


def test_a_request_that_never_started_does_not_keep_the_next_session_waiting():
    engine = Engine(make_model("llama-sinks-local"), num_blocks=1)
    engine.add("long", QUESTIONS[1], 20)
    engine.step()
    for number in (0, 1):
        engine.add(str(number), PROMPTS[number], 5)
    engine.step()
    assert list(engine.processor.scheduler.waiting_requests) == ["0", "1"]
    engine.processor.fail_all_requests(RuntimeError("the session ends"))
    engine.processor.reset()
    engine.add("2", PROMPTS[2], 5)
    engine.run()
    check_results(engine, ["2"])
