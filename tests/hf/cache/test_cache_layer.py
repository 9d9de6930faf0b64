"""A cache layer shows every token exactly the keys of the definition, and keeps exactly those it needs."""

import copy
import gc
import random
from dataclasses import dataclass

import pytest
import torch
from conftest import SEED

from flash_dmattn import NEVER, Visibility
from flash_dmattn.ranking import find_victim
from flash_dmattn_hf.cache.eviction import CacheView
from flash_dmattn_hf.cache.handover import hand_over
from flash_dmattn_hf.cache.layer import DynamicMaskCacheLayer
from flash_dmattn_hf.config import DynamicMaskConfig
from flash_dmattn_hf.gates.importance import Gate

from ..cache_definition import positions_of, query_rows, sees, survives

NUM_KV_HEADS, GROUP_SIZE = 2, 2


class ReadingGate(Gate):
    """A gate whose importances are written in the values, one channel per query head of the group."""

    def __init__(self, config, sliding_window=None):
        self.layer_idx, self.config, self.sliding_window = 0, config, sliding_window
        self.group_size = GROUP_SIZE if config.importance_heads == "query" else 1
        self.num_kv_heads, self.num_importance_heads = NUM_KV_HEADS, NUM_KV_HEADS * self.group_size
        self.num_calls, self.head_dim = 0, 4

    def __call__(self, value):
        self.num_calls += value.shape[2]
        return value[..., : self.group_size].transpose(2, 3).flatten(1, 2).float()


@dataclass
class Case:
    importance: torch.Tensor  # (B, Hi, N)
    padding_mask: torch.Tensor  # (B, N)
    chunks: list[int]
    config: DynamicMaskConfig
    sliding_window: int | None

    @property
    def windows(self):
        names = ("keep_window_size", "num_sink_tokens", "local_window_size")
        return {name: getattr(self.config, name) for name in names}


def draw(number):
    rng = random.Random(f"{SEED} {number}")
    length, batch = rng.randint(1, 40), rng.choice([1, 2, 3])
    w = rng.choice([1, 2, 3, 5, 8, 12])
    s = rng.choice([0, 0, min(w, 2), rng.randint(0, w)])
    r = rng.choice([0, 0, w - s, rng.randint(0, w - s)])
    heads = rng.choice(["kv", "query"])
    generator = torch.Generator().manual_seed(rng.randrange(2**31))
    shape = (batch, NUM_KV_HEADS * (GROUP_SIZE if heads == "query" else 1), length)
    importance = torch.randint(0, rng.choice([1, 3, 10**6]), shape, generator=generator).float()
    if rng.random() < 0.2:
        special = torch.tensor([torch.nan, -torch.inf, -0.0, 0.0])
        importance = special[torch.randint(0, 4, shape, generator=generator)]
    mask = torch.ones(batch, length, dtype=torch.bool)
    if rng.random() < 0.6:
        mask = torch.rand(batch, length, generator=generator) < rng.choice([0.5, 0.9])
        if rng.random() < 0.5:
            mask = mask.sort(dim=1, descending=rng.random() < 0.3).values
    chunks = []
    while sum(chunks) < length:
        chunks.append(min(length - sum(chunks), rng.choice([1, 1, 1, 2, 3, 7, 20])))
    config = DynamicMaskConfig(w, s, r, importance_heads=heads)
    return Case(importance, mask, chunks, config, rng.choice([None, None, w + 1, 2 * w + 3]))


def tokens(case, start, end):
    """Keys holding the row number and values holding the importances: (B, Hkv, T, 4) each."""
    batch = case.importance.shape[0]
    rows = torch.arange(start, end, dtype=torch.float32)
    key = rows.view(1, 1, -1, 1).expand(batch, NUM_KV_HEADS, end - start, 4).contiguous()
    importance = case.importance[:, :, start:end].unflatten(1, (NUM_KV_HEADS, -1)).transpose(2, 3)
    value = torch.zeros_like(key)
    value[..., : importance.shape[-1]] = importance
    return key, value


def process(layer, case, start, end, *, mask=True):
    """One forward of rows start..end without the model; returns what the new tokens saw, as a view."""
    key, value = layer.update(*tokens(case, start, end))
    assert hand_over.take(layer.gate, key, value) is layer
    is_padded = mask and not case.padding_mask.all()
    padding_mask = case.padding_mask[:, start:end] if is_padded else None
    if layer.takes_step:
        return step(layer, padding_mask)
    view = layer.view(padding_mask)
    layer.evict()
    return view._replace(query_positions=query_rows(view, end - start))


def step(layer, padding_mask):
    """The same for one token that goes into the slots at once: it sees the slots as they are after it."""
    before = layer.lengths[:, :1].clone()
    batch, num_heads, _, head_dim = layer.keys.shape
    layer.step(torch.zeros(batch, 1, NUM_KV_HEADS * GROUP_SIZE, head_dim), padding_mask)
    real = layer.lengths[:, :1] > before
    query_positions = torch.where(real, before, -1)
    visible = (layer.positions >= 0) & (query_positions[:, None] >= 0)
    if layer.windows.sliding_window is not None:
        visible = visible & (query_positions[:, None] - layer.positions < layer.windows.sliding_window)
    visibility = Visibility(layer.positions.clone(), torch.where(visible, NEVER, layer.positions))
    states = layer.keys.clone(), layer.values, layer.importance.clone()
    return CacheView(*states, visibility, query_positions, is_ordered=False)


def shown(view, length):
    """Which rows each query of a view sees: bool (B, H, T, length), read off the keys' contents."""
    birth, death = (bound.unsqueeze(2) for bound in view.visibility)
    t = view.query_positions[:, None, :, None]
    visible = (birth <= t) & (t < death)
    rows = view.key[..., 0].long().unsqueeze(2).expand(visible.shape)
    return torch.zeros(*visible.shape[:3], length, dtype=torch.long).scatter_add_(3, rows, visible.long())


def held(layer, length):
    rows = layer.keys[..., 0].long()
    real = (layer.positions >= 0).long()
    return torch.zeros(*rows.shape[:2], length, dtype=torch.long).scatter_add_(2, rows, real)


def assert_it_holds_what_is_needed(layer, case, end):
    """All keys that later tokens can see, in w slots, and none twice."""
    past = case.padding_mask.clone()
    past[:, end:] = False
    needed = survives(case.importance, positions_of(past), past.sum(1), **case.windows).long()
    kept = held(layer, case.importance.shape[2])
    assert (kept >= needed).all() and kept.max() <= 1
    assert (kept.sum(2) <= past.sum(1, keepdim=True)).all()
    assert layer.num_keys <= layer.keys.shape[2] == case.config.keep_window_size
    assert torch.equal(layer.lengths, past.sum(1, keepdim=True).expand_as(layer.lengths))


def expected_visible(case, start, end, mask=None):
    positions = positions_of(case.padding_mask if mask is None else mask)
    options = dict(case.windows, sliding_window=case.sliding_window)
    visible = [sees(case.importance, positions, positions[:, t], **options) for t in range(start, end)]
    return torch.stack(visible, dim=2).long()


def make_layer(case, cls=DynamicMaskCacheLayer):
    gate = ReadingGate(case.config, case.sliding_window)
    layer = cls(gate)
    layer.keep_alive = gate
    return layer


@pytest.mark.parametrize("group", range(5))
def test_chunks_see_and_keep_what_the_definition_says(group):
    for number in range(20 * group, 20 * group + 20):
        case = draw(number)
        layer, start, length = make_layer(case), 0, case.importance.shape[2]
        for size in case.chunks:
            end = start + size
            view = process(layer, case, start, end)
            assert torch.equal(shown(view, length), expected_visible(case, start, end)), (number, start)
            assert layer.get_seq_length() == end
            assert_it_holds_what_is_needed(layer, case, end)
            start = end
        assert layer.gate.num_calls == length, "an importance was computed twice"


def test_without_padding_steps_keep_one_key_more_than_is_needed_at_most():
    """Which is the one that the next token's competition drops."""
    for number in range(300, 320):
        case = draw(number)
        case.padding_mask[:] = True
        layer, length = make_layer(case), case.importance.shape[2]
        for row in range(length):
            process(layer, case, row, row + 1, mask=False)
            assert_it_holds_what_is_needed(layer, case, row + 1)
            past = torch.zeros_like(case.padding_mask)
            past[:, : row + 1] = True
            needed = survives(case.importance, positions_of(past), past.sum(1), **case.windows).long()
            assert (held(layer, length).sum(2) - needed.sum(2) <= (case.config.local_window_size > 0)).all()


class GeneralLayer(DynamicMaskCacheLayer):
    """A layer that treats a single token as a chunk."""

    takes_step = False


def test_the_step_of_one_token_agrees_with_chunks_of_one():
    """Which keys it sees is what select_visible says about the slots."""
    num_evicted = 0
    for number in range(400, 420):
        case = draw(number)
        quick, general = make_layer(case), make_layer(case, GeneralLayer)
        length = case.importance.shape[2]
        for row in range(length):
            view, slow = process(quick, case, row, row + 1), process(general, case, row, row + 1)
            assert torch.equal(shown(view, length), shown(slow, length)), (number, row)
            assert (held(quick, length) >= held(general, length)).all(), (number, row)
        num_evicted += int((length - held(quick, length).sum(2)).sum())
    assert num_evicted > 50


@pytest.mark.parametrize("change", ["chunk", "crop", "reorder", "reset"])
def test_the_victim_is_known_after_every_change(change):
    """What a step needs to know beforehand equals what find_victim says."""
    for number in range(600, 620):
        case = draw(number)
        layer = make_layer(case)
        length = case.importance.shape[2]
        half = length // 2
        if half == 0:
            continue
        if change == "crop":
            layer.activate_past_recording()
            process(layer, case, 0, half)
            layer.crop(-(half // 2))
        else:
            process(layer, case, 0, half)
        if change == "reorder":
            layer.reorder_cache(torch.arange(case.importance.shape[0]).flip(0))
        elif change == "reset":
            layer.reset()
        competition = {name: case.windows[name] for name in ("num_sink_tokens", "local_window_size")}
        expected = find_victim(layer.importance, layer.positions, layer.lengths[:, 0], **competition).unsqueeze(-1)
        found = layer.victims.long().unsqueeze(-1)
        for states in (layer.positions, layer.importance):
            empty = layer.positions.gather(2, expected) < 0
            assert torch.equal(states.gather(2, found)[~empty], states.gather(2, expected)[~empty])
        assert torch.equal(layer.positions.gather(2, found), layer.positions.gather(2, expected))


@pytest.mark.parametrize("group", range(4))
def test_crop_undoes_tokens_without_loss(group):
    """Drafts of several updates each, partly taken back, leave the cache as if only the rest had come."""
    for number in range(500 + 10 * group, 510 + 10 * group):
        case = draw(number)
        rng = random.Random(f"{SEED} crop {number}")
        length = case.importance.shape[2]
        layer, plain = make_layer(case), make_layer(case)
        start = rng.randint(0, length - 1)  # where recording begins
        if start:
            process(layer, case, 0, start)
            process(plain, case, 0, start)
        layer.activate_past_recording()
        for _ in range(30):
            end = start
            for _ in range(rng.randint(1, 4)):
                size = rng.choice([1, 1, 2, 5, 15])
                if end + size <= length:
                    view = process(layer, case, end, end + size)
                    assert torch.equal(shown(view, length), expected_visible(case, end, end + size)), (number, end)
                    end += size
            kept_until = rng.randint(start, end)
            layer.crop(kept_until - end)
            assert layer.get_seq_length() == kept_until
            if kept_until > start:
                process(plain, case, start, kept_until)
            if plain.is_initialized and layer.is_initialized:
                assert_it_holds_what_is_needed(layer, case, kept_until)
                assert torch.equal(layer.lengths, plain.lengths)
            start = kept_until


def simple_case(*, length=30, w=8, s=2, r=3, batch=2, heads="kv"):
    importance = torch.rand(batch, NUM_KV_HEADS * (GROUP_SIZE if heads == "query" else 1), length)
    config = DynamicMaskConfig(w, s, r, importance_heads=heads)
    return Case(importance, torch.ones(batch, length, dtype=torch.bool), [length], config, None)


def test_crop_without_recording_undoes_only_what_is_still_whole():
    case = simple_case()
    layer = make_layer(case)
    process(layer, case, 0, 5)
    layer.crop(-2)
    assert layer.get_seq_length() == 3 and layer.num_keys == 3
    process(layer, case, 3, 20)
    layer.crop(0)
    with pytest.raises(ValueError, match=r"tokens_to_remove must be at least 0, got -1.*activate_past_recording"):
        layer.crop(-1)
    assert layer.get_seq_length() == 20


def test_crop_never_reaches_before_the_recording():
    case = simple_case()
    layer = make_layer(case)
    process(layer, case, 0, 20)
    layer.activate_past_recording()
    process(layer, case, 20, 23)
    with pytest.raises(ValueError, match=r"tokens_to_remove must be at least -3, got -4"):
        layer.crop(-4)
    layer.crop(-3)
    assert layer.get_seq_length() == 20


def test_crop_refuses_a_positive_number():
    with pytest.raises(ValueError, match="tokens_to_remove must be zero or minus the number of tokens, got 3"):
        make_layer(simple_case()).crop(3)


def test_a_recording_ends_when_the_flag_is_cleared_from_outside():
    case = simple_case()
    layer = make_layer(case)
    layer.activate_past_recording()
    for row in range(20):
        process(layer, case, row, row + 1)
    assert layer.num_keys == 20
    layer.record_past = False
    process(layer, case, 20, 21)
    assert layer.num_keys == 8
    assert_it_holds_what_is_needed(layer, case, 21)


def test_stop_past_recording_returns_to_constant_size_at_once():
    case = simple_case()
    layer = make_layer(case)
    layer.activate_past_recording()
    process(layer, case, 0, 20)
    assert layer.num_keys == 20
    layer.stop_past_recording()
    assert layer.num_keys == 8
    assert_it_holds_what_is_needed(layer, case, 20)


@pytest.mark.parametrize("heads", ["kv", "query"])
def test_batch_operations_move_the_whole_state(heads):
    case = simple_case(batch=3, heads=heads)
    case.padding_mask[1, :7] = False
    layer = make_layer(case)
    process(layer, case, 0, 20)

    def rows_of(layer, index):
        return [state[index].clone() for state in layer._state().values()]

    rows = [rows_of(layer, index) for index in range(3)]
    reordered, repeated, selected = copy.deepcopy(layer), copy.deepcopy(layer), copy.deepcopy(layer)
    reordered.reorder_cache(torch.tensor([2, 0, 0]))
    repeated.batch_repeat_interleave(2)
    selected.batch_select_indices(torch.tensor([1]))
    for changed, order in ((reordered, [2, 0, 0]), (repeated, [0, 0, 1, 1, 2, 2]), (selected, [1])):
        for index, source in enumerate(order):
            assert all(map(torch.equal, rows_of(changed, index), rows[source]))
        assert changed.get_seq_length() == 20


def test_batch_selection_takes_a_mask():
    case = simple_case(batch=3)
    layer = make_layer(case)
    process(layer, case, 0, 20)
    third = layer.keys[2].clone()
    layer.batch_select_indices(torch.tensor([False, False, True]))
    assert layer.keys.shape[0] == 1 and torch.equal(layer.keys[0], third)


def test_reset_forgets_everything():
    case = simple_case()
    layer, fresh = make_layer(case), make_layer(case)
    process(layer, case, 0, 20)
    size, where = layer.nbytes, layer.keys.data_ptr()
    layer.reset()
    assert layer.get_seq_length() == 0 and layer.num_keys == 0
    assert layer.nbytes == size and layer.keys.data_ptr() == where and not layer.keys.any()
    length = case.importance.shape[2]
    assert torch.equal(shown(process(layer, case, 0, 9), length), shown(process(fresh, case, 0, 9), length))


def test_a_deepcopy_goes_its_own_way_and_shares_the_gate():
    case = simple_case()
    layer = make_layer(case)
    process(layer, case, 0, 20)
    gate = layer.keep_alive
    del layer.keep_alive
    twin = copy.deepcopy(layer)
    assert twin.gate is gate
    process(twin, case, 20, 25)
    assert layer.get_seq_length() == 20 and twin.get_seq_length() == 25


def test_a_layer_does_not_keep_its_gate_alive():
    layer = make_layer(simple_case())
    del layer.keep_alive
    gc.collect()
    with pytest.raises(RuntimeError, match="model of this DynamicMaskCache no longer exists"):
        _ = layer.gate


def test_offload_and_prefetch_move_every_tensor():
    case = simple_case()
    layer = make_layer(case)
    process(layer, case, 0, 20)
    layer.to("meta")
    assert {state.device.type for state in layer._state().values()} == {"meta"}
    layer = make_layer(case)
    process(layer, case, 0, 20)
    before = {name: state.clone() for name, state in layer._state().items()}
    layer.offload()
    layer.prefetch()
    assert all(torch.equal(before[name], state) for name, state in layer._state().items())


def test_tokens_that_were_never_attended_to_are_an_error():
    case = simple_case()
    layer = make_layer(case)
    layer.update(*tokens(case, 0, 5))
    with pytest.raises(RuntimeError, match="last 5 tokens .* never attended to by flash_dmattn"):
        layer.update(*tokens(case, 5, 6))
    with pytest.raises(RuntimeError, match="never attended to"):
        layer.crop(-1)
    layer.reset()
    process(layer, case, 0, 5)


def test_a_padding_mask_of_another_shape_is_an_error():
    case = simple_case()
    layer = make_layer(case)
    layer.update(*tokens(case, 0, 5))
    with pytest.raises(ValueError, match=r"padding_mask must have shape \(2, 5\), got \(2, 6\)"):
        layer.view(case.padding_mask[:, :6])


def test_another_batch_size_is_an_error():
    case, other = simple_case(batch=2), simple_case(batch=3)
    layer = make_layer(case)
    process(layer, case, 0, 5)
    with pytest.raises(ValueError, match="key_states must have the cache's batch size 2, got 3"):
        layer.update(*tokens(other, 5, 6))


def test_other_windows_are_taken_by_an_empty_layer_only():
    case, small = simple_case(w=8), simple_case(w=5)
    layer = make_layer(case)
    process(layer, case, 0, 9)
    layer.gate.config = small.config
    sentence = "settings of layer 0 must be .*'keep_window_size': 8.*got .*'keep_window_size': 5"
    with pytest.raises(ValueError, match=sentence):
        layer.update(*tokens(case, 9, 10))
    layer.reset()
    view = process(layer, small, 0, 12)
    assert torch.equal(shown(view, 30), expected_visible(small, 0, 12)) and layer.num_keys == 5


def test_sizes_are_those_of_the_window():
    case = simple_case(length=40, w=8, s=2, r=3)
    layer = make_layer(case)
    process(layer, case, 0, 40)
    keys = values = 2 * 2 * 8 * 4 * 4
    importance = positions = 2 * 2 * 8 * 4
    victims = lengths = arrivals = 2 * 2 * 4
    assert layer.nbytes == keys + values + importance + positions + victims + lengths + arrivals + 2 * 8
    assert layer.get_mask_sizes(3) == (43, 0)


def test_memory_is_allocated_once():
    """Chunks, steps, reordering, undoing and a second prompt leave every tensor where it is."""
    case = simple_case(length=40)
    layer = make_layer(case)
    process(layer, case, 0, 3)
    addresses = {name: state.data_ptr() for name, state in layer._state().items()}
    process(layer, case, 3, 20)
    for row in range(20, 25):
        process(layer, case, row, row + 1)
    layer.reorder_cache(torch.tensor([1, 1]))
    layer.activate_past_recording()
    process(layer, case, 25, 30)
    layer.crop(-2)
    layer.stop_past_recording()
    layer.reset()
    process(layer, case, 0, 20)
    assert {name: state.data_ptr() for name, state in layer._state().items()} == addresses


def test_a_second_prompt_can_have_another_batch_size():
    small, large = simple_case(batch=1), simple_case(batch=3)
    layer = make_layer(small)
    process(layer, small, 0, 20)
    layer.reset()
    view = process(layer, large, 0, 20)
    assert torch.equal(shown(view, 30), expected_visible(large, 0, 20))


def test_no_shape_depends_on_data():
    """Two rows with very different padding and ties leave tensors of the same shapes as any other data."""
    shapes = set()
    for seed in range(5):
        torch.manual_seed(seed)
        case = simple_case(length=30)
        case.padding_mask = torch.rand(2, 30) < 0.2 * (seed + 1)
        layer = make_layer(case)
        process(layer, case, 0, 17)
        for row in range(17, 30):
            process(layer, case, row, row + 1)
        shapes.add(tuple(tuple(state.shape) for state in layer._state().values()))
    assert len(shapes) == 1
