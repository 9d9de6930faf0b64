"""Native Doge: the logits and gradients of its own eager attention, without any N x N tensor."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, DogeConfig, DogeForCausalLM
from transformers.models.doge.modeling_doge import DogeAttention

from flash_dmattn_hf import dynamic_mask_config, iter_gates

from ..dense_definition import visible

WINDOW = 8
VOCAB_SIZE = 200


def make(implementation="flash_dmattn", dtype=torch.float32, **overrides):
    torch.manual_seed(0)
    config = DogeConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        keep_window_size=WINDOW,
        max_position_embeddings=128,
        attn_implementation=implementation,
        **overrides,
    )
    model = DogeForCausalLM(config)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, DogeAttention):
                module.A.normal_()
                module.dt_proj.weight.normal_()
    return model.to(dtype).eval()


def distinct(batch, length, seed=0):
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randperm(VOCAB_SIZE - 3, generator=generator)[:length] + 3 for _ in range(batch)]
    return torch.stack(rows)


def gradients(model, input_ids, mask):
    model.zero_grad()
    logits = model(input_ids, attention_mask=mask, use_cache=False).logits
    real = slice(None) if mask is None else mask.bool()
    logits[real].square().sum().backward()
    return logits[real].detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("length", [5, 8, 9, 40])
def test_equals_native_eager(length, padding):
    ours, native = make(), make("eager")
    input_ids, mask = distinct(2, length), None
    if padding != "none":
        mask = torch.ones_like(input_ids)
        mask[0, :3] = 0
        mask = mask if padding == "left" else mask.flip(-1)
    logits, grads = gradients(ours, input_ids, mask)
    expected, native_grads = gradients(native, input_ids, mask)
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
    assert grads.keys() == native_grads.keys()
    assert any(name.endswith("self_attn.A") for name in grads)
    for name, gradient in native_grads.items():
        scale = 1 + gradient.abs().max()
        torch.testing.assert_close(grads[name] / scale, gradient / scale, atol=1e-4, rtol=0, msg=name)


def test_repeated_tokens_equal_native_with_our_tie_rule(monkeypatch):
    """Native topk breaks ties its own way, so native gets the definition's choice of keys instead."""
    length = 40
    input_ids = distinct(2, length) % 5 + 3

    def with_our_ties(self, hidden_states, dt_states, keep_window_size, attention_mask):
        lowest = torch.finfo(hidden_states.dtype).min
        settings = ours.model.layers[0].self_attn.dma.config
        real = torch.ones(hidden_states.shape[:2], dtype=torch.bool)
        seen = visible(dt_states.detach(), real, settings).tril()
        return dt_states[:, :, None, :].masked_fill(~seen, lowest)

    ours, native = make(dtype=torch.float64), make("eager", dtype=torch.float64)
    logits, grads = gradients(ours, input_ids, None)
    plain = native(input_ids).logits
    monkeypatch.setattr(DogeAttention, "prepare_dynamic_mask", with_our_ties)
    expected, native_grads = gradients(native, input_ids, None)
    assert (plain - expected).abs().max() > 1e-4
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)
    for name, gradient in native_grads.items():
        torch.testing.assert_close(grads[name], gradient, atol=1e-4, rtol=1e-4, msg=name)


class LargestTensor(torch.utils._python_dispatch.TorchDispatchMode):
    """Remembers whether any tensor had two dimensions of at least `length`."""

    def __init__(self, length):
        super().__init__()
        self.length, self.found = length, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor) and sum(size >= self.length for size in tensor.shape) > 1:
                self.found.append((str(func), tuple(tensor.shape)))
        return out


@pytest.mark.parametrize("mask", [False, True], ids=["plain", "padded"])
def test_no_square_tensor(mask):
    length = 450  # longer than the vocabulary and every hidden size
    input_ids = torch.randint(3, VOCAB_SIZE, (1, length))
    attention_mask = torch.ones_like(input_ids) if mask else None
    if mask:
        attention_mask[:, :9] = 0
    for implementation, squares in (("flash_dmattn", False), ("eager", True)):
        model = make(implementation)
        with LargestTensor(length) as watch:
            model(input_ids, attention_mask=attention_mask, use_cache=False).logits.sum().backward()
        assert bool(watch.found) is squares, watch.found[:3]


def test_generates_as_without_a_cache():
    model = make(dtype=torch.float64)
    input_ids = distinct(2, 14)
    mask = torch.ones_like(input_ids)
    mask[0, :4] = 0
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    cached = model.generate(input_ids, attention_mask=mask, **options)
    assert torch.equal(cached, model.generate(input_ids, attention_mask=mask, **options, use_cache=False))


def test_checkpoint_keeps_native_names(tmp_path):
    native = make("eager")
    native.save_pretrained(tmp_path)
    ours, info = AutoModelForCausalLM.from_pretrained(
        tmp_path, attn_implementation="flash_dmattn", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert not any(".dma." in name for name in ours.state_dict())
    settings = next(iter_gates(ours))[2].config
    assert (settings.keep_window_size, settings.num_sink_tokens, settings.local_window_size) == (WINDOW, 0, 0)
    assert settings.importance == "zoh"
    ours.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.config._attn_implementation == "sdpa"
    assert not hasattr(again.config, "flash_dmattn")


def test_another_window_at_load_time():
    with dynamic_mask_config(keep_window_size=64):
        wide = make()
    input_ids = distinct(2, 40)
    with torch.no_grad():
        torch.testing.assert_close(wide(input_ids).logits, reference(input_ids, 64), atol=1e-4, rtol=0)
        assert (wide(input_ids).logits - make()(input_ids).logits).abs().max() > 1e-3


def test_another_window_is_saved(tmp_path):
    with dynamic_mask_config(keep_window_size=16):
        make().save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.config._attn_implementation == "flash_dmattn"
    assert next(iter_gates(again))[2].config.keep_window_size == 16


def test_importance_per_query_head_is_refused():
    with dynamic_mask_config(importance_heads="query"), pytest.raises(ValueError, match="importance_heads"):
        make()


def reference(input_ids, keep_window_size):
    native = make("eager")
    for module in native.modules():
        if isinstance(module, DogeAttention):
            module.keep_window_size = keep_window_size
    return native(input_ids).logits


def test_switching_and_copying():
    model, input_ids = make(), distinct(2, 40)
    with torch.no_grad():
        ours, native = model(input_ids).logits, make("eager")(input_ids).logits
        twin = copy.deepcopy(model)
        twin.model.layers[0].self_attn.A.add_(1.0)
        assert not torch.equal(twin(input_ids).logits, ours)
        torch.testing.assert_close(model(input_ids).logits, ours)
        model.set_attn_implementation("eager")
        assert torch.equal(model(input_ids).logits, native)
        model.set_attn_implementation("flash_dmattn")
        assert torch.equal(model(input_ids).logits, ours)
