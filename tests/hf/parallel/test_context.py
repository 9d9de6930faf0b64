"""A sequence on 2 and 4 ranks trains as one process does: outputs, loss, and the gradients of all parameters."""

import pytest

from flash_dmattn_hf import context_parallel

from .jobs import (
    CASES,
    births_of_seen_keys,
    compare,
    compiled,
    fail_on_one_rank,
    half_precision,
    is_freed,
    order_of_events,
    positions_of_one_row,
    refusals,
    traffic,
)
from .processes import run_on_ranks


@pytest.fixture(scope="module")
def differences(tmp_path_factory):
    """Returns what `compare` does for all cases on each rank, by the number of ranks."""
    sizes = (2, 4)
    return {size: run_on_ranks(size, tmp_path_factory.mktemp("ranks"), compare, list(CASES)) for size in sizes}


def allowed(name: str, part: str) -> float:
    """The norms of these models work in float32, those of gemma3n's keys too, and so does the loss of whole logits."""
    model_type, is_whole = CASES[name].model_type, (name, part) == ("whole logits", "loss")
    if is_whole or model_type == "gemma3n_text" or (model_type == "gemma2" and "norm" in part):
        return 1e-6
    return 1e-9


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("name", CASES)
def test_ranks_train_as_one_process(differences, name, world_size):
    found = differences[world_size]
    assert all(isinstance(each, dict) for each in found), found
    wrong = {part: error for part, error in found[0][name].items() if not error < allowed(name, part)}
    assert found[0][name] and not wrong, wrong


def test_an_exchange_has_the_same_bytes_for_every_length(tmp_path):
    layers, window, kv_heads, head_dim = 2, 10, 2, 8
    one = window * kv_heads * (2 * head_dim * 4 + 8)
    for rank, found in enumerate(run_on_ranks(2, tmp_path, traffic, (32, 64, 128))):
        returned = layers * window * kv_heads * (2 * head_dim * 4 + 4) * rank  # the gradient of the first rank's keys
        assert found == [(layers, layers * one, returned)] * 3


@pytest.mark.parametrize("name", ["checkpointed", "packed", "soft", "whole logits"])
def test_a_step_keeps_no_context(tmp_path, name):
    assert run_on_ranks(2, tmp_path, is_freed, name) == [True, True]


def test_keys_and_values_travel_while_the_rank_selects(tmp_path):
    for found in run_on_ranks(2, tmp_path, order_of_events):
        assert found == ["gather", "gather in the background", "select", "wait"] * 2


@pytest.mark.parametrize("name", ["sinks and window", "packed", "packed, sliding"])
def test_keys_stand_in_the_order_of_their_births(tmp_path, name):
    assert run_on_ranks(2, tmp_path, births_of_seen_keys, name) == [True, True]


def test_a_compiled_model_trains_between_its_graphs(tmp_path):
    for found in run_on_ranks(2, tmp_path, compiled):
        assert isinstance(found, dict), found
        assert found.pop("graphs") > 2 and found and max(found.values()) < 1e-9, found


def test_a_rank_that_fails_ends_the_others_with_its_reason(tmp_path):
    first, second = run_on_ranks(2, tmp_path, fail_on_one_rank)
    assert "ArithmeticError: the second layer is tired" in second
    assert "PeerFailure: context_parallel ends because rank 1: ArithmeticError: the second layer is tired" in first


def test_bfloat16_autocast_on_ranks_is_that_of_one_process(tmp_path):
    assert all(error < 1e-3 for error in run_on_ranks(2, tmp_path, half_precision))


REFUSALS = {
    "padding": "does not support padding",
    "padding on one rank": "does not support padding",
    "length": "the length of a sequence must be a multiple of the 2 ranks, got 47",
    "unequal shards": "must hold as many rows and tokens, got [(2, 24), (2, 23)]",
    "uneven buffers": "buffers must have lengths that 2 ranks divide, got [48, 47]",
    "no positions": "position_ids must be those of the whole sequence, got 0 to 23 on every rank",
    "constant cache": "does not support cached tokens",
    "dense model": 'context_parallel needs models with attn_implementation="flash_dmattn", got "sdpa"',
    "dense with gradient": "dense attention inside context_parallel has no gradient",
    "dense and packed": "dense attention to packed documents is not supported inside context_parallel",
    "dense layer": "layer 1 attends to all keys",
    "chunks": "layers that attend within chunks are not supported inside context_parallel",
    "no shift_labels": "labels must come with shift_labels inside context_parallel",
    "no shift_labels, chunked": "labels must come with shift_labels inside context_parallel",
    "band": "soft_selection needs a band inside context_parallel",
    "soft packed": "soft_selection of packed documents is not supported inside context_parallel",
}


def test_what_ranks_cannot_do_is_refused_on_all_of_them(tmp_path):
    for found in run_on_ranks(2, tmp_path, refusals):
        assert isinstance(found, dict), found
        for name, sentence in REFUSALS.items():
            assert found[name].startswith("ValueError") and sentence in found[name], (name, found[name])


def test_one_row_of_positions_is_that_of_all_sequences(tmp_path):
    assert run_on_ranks(2, tmp_path, positions_of_one_row) == [[[0, 1, 2, 3]] * 2, [[4, 5, 6, 7]] * 2]


def test_it_needs_torch_distributed():
    with pytest.raises(RuntimeError, match="call init_process_group"):
        context_parallel()
