"""Slots in 8 bits: a model sees exactly the rounded keys and values, and everything a cache does still works."""

import copy

import pytest
import torch
from transformers import CompileConfig

from flash_dmattn.float8 import from_float8, round_to_float8
from flash_dmattn_hf.cache import CacheSnapshot, DynamicMaskCache
from flash_dmattn_hf.cache.slots import SlotLayer

from ..generation_models import NEW, greedy, make_model, make_prompt

FLOAT8 = torch.float8_e4m3fn
KINDS = ["llama-topk", "llama-sinks-local", "llama-query-heads", "qwen2-sliding-below-w", "deepseek-v3", "doge"]


@pytest.fixture
def rounding(monkeypatch):
    """Lets full-precision slots hold rounded numbers: the definition of slots in 8 bits."""

    def use():
        original, step = SlotLayer._write, SlotLayer.step

        def write(self, name, start, rows):
            original(self, name, start, rounded(rows) if name in ("keys", "values") else rows)

        def rounded_step(self, query, padding_mask=None, **options):
            key, value, importance = self._new
            self._new = rounded(key), rounded(value), importance
            return step(self, query, padding_mask, **options)

        monkeypatch.setattr(SlotLayer, "_write", write)
        monkeypatch.setattr(SlotLayer, "step", rounded_step)

    return use


def rounded(states):
    return from_float8(*round_to_float8(states), states.dtype)


@torch.no_grad()
def run(model, cache, ids, mask, chunks):
    """Logits of one forward per chunk; several tokens, then one by one, across the edge of the window."""
    found, start = [], 0
    for size in chunks:
        end = start + size
        out = model(ids[:, start:end], attention_mask=mask[:, :end], past_key_values=cache)
        found.append(out.logits)
        start = end
    return torch.cat(found, dim=1)


CHUNKS = [5, 1, 1, 14, 1, 1, 1, 6, 1, 1]


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_model_sees_rounded_slots(kind, static, rounding):
    """Batch of 2, one padded: logits, positions and importances of full-precision slots that hold rounded numbers."""
    model = make_model(kind)
    ids, mask = make_prompt(batch=2, length=sum(CHUNKS))
    mask[1, :4] = 0
    cache = DynamicMaskCache(model, static=static, slot_dtype=FLOAT8)
    found = run(model, cache, ids, mask, CHUNKS)
    rounding()
    full = DynamicMaskCache(model, static=static)
    torch.testing.assert_close(found, run(model, full, ids, mask, CHUNKS), atol=1e-9, rtol=1e-9)
    for layer, other in zip(cache.mask_layers, full.mask_layers, strict=True):
        assert layer.keys.dtype == layer.values.dtype == FLOAT8
        assert torch.equal(layer.positions, other.positions)
        torch.testing.assert_close(layer.importance, other.importance, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("kind", ["llama-topk", "llama-sinks-local"])
def test_the_first_layer_keeps_the_same_tokens(kind):
    """Its inputs are the same, and so are its importances, to the bit. Outputs are near, and not the same."""
    model = make_model(kind)
    ids, mask = make_prompt(batch=2, length=sum(CHUNKS))
    caches = [DynamicMaskCache(model, slot_dtype=slot_dtype) for slot_dtype in (None, "float8_e4m3fn")]
    full, rounded = (run(model, cache, ids, mask, CHUNKS) for cache in caches)
    first, other = (cache.layers[0] for cache in caches)
    assert torch.equal(first.positions, other.positions) and torch.equal(first.importance, other.importance)
    assert torch.equal(full[:, :5], rounded[:, :5])  # tokens of one forward see each other unrounded
    error = (full - rounded).norm() / full.norm()
    assert 1e-4 < error < 0.2


def test_keys_and_values_take_half_the_memory():
    model = make_model("llama-topk", dtype=torch.bfloat16, head_dim=64)
    sizes = []
    for slot_dtype in (None, FLOAT8):
        cache = DynamicMaskCache(model, slot_dtype=slot_dtype)
        run(model, cache, *make_prompt(length=3), [3])
        sizes.append(sum(state.nbytes for state in cache.tensors()) / (2 * 2 * 12))  # layers, heads, slots
    assert sizes == [4 * 64 + 8 + 1, 2 * 64 + 4 + 8 + 1]  # lengths, victims and arrivals take 12 bytes a head


COMPILED = CompileConfig(fullgraph=True, backend="eager", mode=None)
COMPILED._compile_all_devices = True
STATIC = {"cache_implementation": "static"}


@pytest.mark.parametrize(
    "settings", [{}, STATIC, {**STATIC, "compile_config": COMPILED}], ids=["dynamic", "static", "compiled"]
)
def test_generate_takes_a_cache_config(settings):
    model = make_model("llama-sinks-local")
    ids, mask = make_prompt(batch=2)
    result = greedy(
        model, ids, mask, cache_config={"slot_dtype": "float8_e4m3fn"}, return_dict_in_generate=True, **settings
    )
    assert result.past_key_values.slot_dtype == FLOAT8
    assert result.past_key_values.is_static == bool(settings)
    cache = DynamicMaskCache(model, slot_dtype=FLOAT8)
    assert torch.equal(greedy(model, ids, mask, past_key_values=cache), result.sequences)


@pytest.mark.parametrize("mode", [{"num_beams": 3}, {"prompt_lookup_num_tokens": 3}], ids=["beams", "prompt-lookup"])
def test_modes_of_generation(mode):
    """Beams reorder the slots, and candidates are undone: as many ids as asked for, from a cache of constant size."""
    model = make_model("llama-sinks-local")
    ids, mask = make_prompt(batch=1)
    cache = DynamicMaskCache(model, slot_dtype=FLOAT8)
    found = greedy(model, ids, mask, past_key_values=cache, **mode)
    assert found.shape[1] == ids.shape[1] + NEW and cache.max_keys == 16


def after(model, length, **options):
    cache = DynamicMaskCache(model, slot_dtype=FLOAT8, **options)
    ids, mask = make_prompt(length=length)
    run(model, cache, ids, mask, [length - 2, 1, 1])
    return cache


def continued(model, cache, batch=1):
    """Logits of three more tokens."""
    ids, _ = make_prompt(length=3, seed=5)
    with torch.no_grad():
        out = [model(ids[:, t : t + 1].expand(batch, -1), past_key_values=cache).logits for t in range(3)]
    return torch.cat(out, dim=1)


@pytest.mark.parametrize("length", [9, 30])
def test_copies_snapshots_and_rows_go_on_the_same(length, tmp_path):
    model = make_model("llama-sinks-local")
    cache = after(model, length)
    snapshot = cache.snapshot()
    snapshot.save(tmp_path / "prefix.safetensors")
    restored = CacheSnapshot.load(tmp_path / "prefix.safetensors").restore(model, batch_size=2)
    loaded = DynamicMaskCache(model, slot_dtype=FLOAT8, static=True)
    loaded.load_state_dict(snapshot.state)
    copied, repeated = copy.deepcopy(cache), copy.deepcopy(cache)
    repeated.batch_repeat_interleave(3)
    repeated.reorder_cache(torch.tensor([2, 0, 1]))
    repeated.batch_select_indices(torch.tensor([1]))
    moved = copy.deepcopy(cache)
    for layer in moved.layers:
        layer.offload()
        layer.prefetch()
    assert restored.slot_dtype == FLOAT8 and restored.layers[0].dtype == torch.float64
    expected = continued(model, cache)
    for other in (loaded, copied, repeated, moved):
        torch.testing.assert_close(continued(model, other), expected, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(continued(model, restored, 2), expected.expand(2, -1, -1), atol=1e-12, rtol=1e-12)


def test_undone_tokens_leave_nothing():
    model = make_model("llama-sinks-local")
    cache, expected = after(model, 30), after(model, 30)
    cache.activate_past_recording()
    ids, _ = make_prompt(length=4, seed=3)
    with torch.no_grad():
        model(ids, past_key_values=cache)
    cache.crop(-4)
    cache.stop_past_recording()
    assert torch.equal(continued(model, cache), continued(model, expected))


def test_another_model_dtype_after_a_reset():
    model = make_model("llama-topk").float()
    cache = after(model, 9)
    cache.reset()
    model.double()
    ids, mask = make_prompt(length=9)
    run(model, cache, ids, mask, [7, 1, 1])
    assert cache.layers[0].dtype == torch.float64 and cache.layers[0].keys.dtype == FLOAT8
    assert torch.equal(continued(model, cache), continued(model, after(model, 9)))


def test_what_is_refused():
    model = make_model("llama-sinks-local")
    ids, mask = make_prompt()
    for slot_dtype in (torch.float8_e5m2, torch.int8, "int4"):
        with pytest.raises(ValueError, match="slot_dtype must be None or torch.float8_e4m3fn, got "):
            DynamicMaskCache(model, slot_dtype=slot_dtype)
    with pytest.raises(ValueError, match=r"state must be of a cache with slot_dtype=None, got float8_e4m3fn"):
        DynamicMaskCache(model).load_state_dict(after(model, 9).state_dict())
    with pytest.raises(ValueError, match=r"cache_config must have no setting but 'slot_dtype' .* got \['nbits'\]"):
        greedy(model, ids, mask, cache_config={"nbits": 4})
    with pytest.raises(ValueError, match=r"cache_config must be a dict such as .*, got 'float8_e4m3fn'"):
        greedy(model, ids, mask, cache_config="float8_e4m3fn")
    with pytest.raises(ValueError, match=r"must be a DynamicMaskCache\(model, slot_dtype=torch.float8_e4m3fn\), as"):
        cache = DynamicMaskCache(model)
        greedy(model, ids, mask, past_key_values=cache, cache_config={"slot_dtype": "float8_e4m3fn"})
    with pytest.raises(RuntimeError, match=r"slots of torch.float8_e4m3fn have no gradient: run .* torch.no_grad\(\)"):
        model(ids, past_key_values=DynamicMaskCache(model, slot_dtype=FLOAT8))
    with pytest.raises(ValueError, match="slot_dtype must be None where slots hold latents, got torch.float8_e4m3fn"):
        DynamicMaskCache(make_model("deepseek-v3-shared"), slot_dtype=FLOAT8)
