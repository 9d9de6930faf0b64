"""A prefix is prefilled once, and any number of texts go on from its snapshot as if each had been processed whole."""

import pytest
import torch
from safetensors.torch import save_file

from flash_dmattn_hf.cache import CacheSnapshot, DynamicMaskCache

from ..generation_models import greedy, make_model, make_prompt


def after_prefix(model, prefix):
    cache = DynamicMaskCache(model)
    with torch.no_grad():
        model(prefix, past_key_values=cache)
    return cache


@pytest.mark.parametrize("kind", ["llama-sinks-local", "llama-shares", "qwen2-sliding-below-w", "doge"])
@pytest.mark.parametrize("length", [7, 40])
def test_texts_with_a_common_prefix(kind, length, tmp_path):
    model = make_model(kind)
    prefix, _ = make_prompt(length=length)
    snapshot = after_prefix(model, prefix).snapshot()
    snapshot.save(tmp_path / "prefix.safetensors")
    for source in (snapshot, CacheSnapshot.load(tmp_path / "prefix.safetensors")):
        assert source.num_tokens == length and source.nbytes == snapshot.nbytes
        for seed in (1, 2):
            ids = torch.cat([prefix, make_prompt(length=5, seed=seed)[0]], dim=1)
            expected = greedy(model, ids, torch.ones_like(ids))
            found = greedy(model, ids, torch.ones_like(ids), past_key_values=source.restore(model))
            assert torch.equal(found, expected)


def test_a_batch_that_goes_on_from_one_snapshot():
    model = make_model("llama-topk")
    prefix, _ = make_prompt(length=30)
    cache = after_prefix(model, prefix)
    snapshot = cache.snapshot()
    cache.reset()  # the snapshot is a copy
    ids = torch.cat([prefix.expand(3, -1), make_prompt(batch=3, length=4, seed=3)[0]], dim=1)
    mask = torch.ones_like(ids)
    found = greedy(model, ids, mask, past_key_values=snapshot.restore(model, batch_size=3))
    assert torch.equal(found, greedy(model, ids, mask))


def test_its_size_does_not_depend_on_the_prefix():
    model = make_model("llama-topk")
    sizes = {after_prefix(model, make_prompt(length=length)[0]).snapshot().nbytes for length in (5, 20, 90)}
    assert len(sizes) == 1


@pytest.mark.parametrize("is_static", [False, True])
def test_latents_do_not_fit_keys_and_values(is_static):
    model = make_model("deepseek-v3-shared")
    caches = [DynamicMaskCache(model, static=static) for static in (is_static, not is_static)]
    (ids, _), (others, _) = make_prompt(length=30), make_prompt(length=9, seed=1)
    with torch.no_grad():
        for cache, prompt in zip(caches, (ids, others), strict=True):
            model(prompt, past_key_values=cache)
    before = caches[1].state_dict()["layers"]
    with pytest.raises(ValueError, match="a cache of latents and one of keys and values do not fit each other"):
        caches[1].load_state_dict(caches[0].state_dict())
    torch.testing.assert_close(caches[1].state_dict()["layers"], before, rtol=0, atol=0, equal_nan=True)
    with pytest.raises(ValueError, match="do not fit each other"):
        caches[0].snapshot().restore(model, static=not is_static)
    restored = caches[0].snapshot().restore(model, static=is_static)
    assert torch.equal(restored.layers[0].keys, caches[0].layers[0].keys)


@pytest.mark.parametrize(
    ("changes", "found"),
    [({"num_key_value_heads": 1}, r"\(2, 8\), got \(1, 8\)"), ({"head_dim": 16}, r"got \(2, 16\)")],
)
def test_other_heads(changes, found):
    snapshot = after_prefix(make_model("llama-topk", **changes), make_prompt()[0]).snapshot()
    with pytest.raises(ValueError, match=f"state must be of a layer whose slots have .*{found}$"):
        snapshot.restore(make_model("llama-topk"))


def test_other_kinds_of_layers():
    settings = {"keep_window_size": 12, "num_sink_tokens": 0, "local_window_size": 0, "layers": [1]}
    native = {"use_sliding_window": True, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
    full = {**native, "layer_types": ["full_attention", "full_attention"]}
    source, target = (
        make_model("qwen2-sliding-below-w", flash_dmattn=settings, **changes) for changes in (native, full)
    )
    snapshot = after_prefix(source, make_prompt()[0]).snapshot()
    with pytest.raises(ValueError, match="state must be of a DynamicLayer, which counts .*, got one that counts .'cum"):
        snapshot.restore(target)


def test_other_models_and_other_files(tmp_path):
    snapshot = after_prefix(make_model("llama-topk"), make_prompt()[0]).snapshot()
    with pytest.raises(ValueError, match="state must be of a layer with the windows"):
        snapshot.restore(make_model("llama-sinks-local"))
    save_file({"x": torch.zeros(1)}, str(tmp_path / "other.safetensors"))
    with pytest.raises(ValueError, match="must be a snapshot of a DynamicMaskCache, got None"):
        CacheSnapshot.load(tmp_path / "other.safetensors")


@pytest.mark.parametrize(
    ("kind", "slot_dtype"),
    [
        ("llama-topk", None),
        ("llama-topk", torch.float8_e4m3fn),
        ("qwen2-sliding-below-w", None),
        ("deepseek-v3-shared", None),
    ],
)
def test_another_dtype(kind, slot_dtype):
    model, states = make_model(kind), {}

    def filled(dtype, length):
        cache = DynamicMaskCache(model.to(dtype), slot_dtype=slot_dtype)
        with torch.no_grad():
            model(make_prompt(length=length)[0], past_key_values=cache)
        return cache

    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        states[dtype] = filled(dtype, 30).state_dict()
    cache = filled(torch.bfloat16, 9)
    before = cache.state_dict()["layers"][0]["tensors"]["values"].float()
    for dtype in states.keys() - {torch.bfloat16}:
        with pytest.raises(ValueError, match=f"the model's dtype, torch.bfloat16, got {dtype}: make it anew"):
            cache.load_state_dict(states[dtype])
        assert torch.equal(cache.layers[0].values.float(), before) and cache.num_tokens == 9
    cache.load_state_dict(states[torch.bfloat16])
    assert cache.num_tokens == 30


@pytest.mark.parametrize("kind", ["llama-topk", "deepseek-v3-shared"])
@pytest.mark.parametrize("length", [1, 5])
def test_a_state_of_autocast_goes_on_under_autocast(kind, length):
    model, (ids, _) = make_model(kind).float(), make_prompt(length=length, seed=1)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        cache = after_prefix(model, make_prompt(length=30)[0])
        snapshot, expected = cache.snapshot(), model(ids, past_key_values=cache).logits
    restored = snapshot.restore(model)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model(ids, past_key_values=restored).logits, expected)


def test_a_state_in_16_bits_for_a_model_in_float32():
    model = make_model("llama-topk").bfloat16()
    snapshot = after_prefix(model, make_prompt(length=30)[0]).snapshot()
    cache = snapshot.restore(model.float())
    message = "value_states must have the dtype of the tokens before, torch.bfloat16, got torch.float32"
    for length in (1, 5):
        with torch.no_grad(), pytest.raises(ValueError, match=message):
            model(make_prompt(length=length, seed=1)[0], past_key_values=cache)
    assert cache.num_tokens == 30
