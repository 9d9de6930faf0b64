"""Layers that share keys see what the layer that made them sees, with a cache of any kind and while training."""

import pytest
import torch

from flash_dmattn_hf import DynamicMaskCache, iter_gates

from ..converted import converted
from ..dense_definition import by_definition
from ..tiny import tokens


def distinct_tokens(length=30):
    """(2, length), none twice in a row: equal tokens would tie."""
    return torch.stack([torch.randperm(90)[:length] + 4 for _ in range(2)])


def test_only_layers_that_make_keys_have_gates():
    assert [gate.layer_idx for _, _, gate in iter_gates(converted("gemma3n_text"))] == [0, 1]


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@pytest.mark.parametrize("chunks", [[30], [11, 19], [17, 1, 1, 11], [1] * 30], ids=str)
@torch.no_grad()
def test_in_any_chunks_a_cache_sees_what_one_pass_sees(chunks, static):
    model, input_ids = converted("gemma3n_text"), distinct_tokens()
    with by_definition(model):
        expected = model(input_ids, use_cache=False).logits
    cache = DynamicMaskCache(model, static=static)
    found = torch.cat([model(ids, past_key_values=cache).logits for ids in input_ids.split(chunks, 1)], 1)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert cache.max_keys == 8


def test_gradient_checkpointing_gives_the_same_gradients():
    model, input_ids = converted("gemma3n_text").train(), tokens()
    gradients = []
    for checkpoints in (False, True):
        model.zero_grad()
        if checkpoints:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model(input_ids, use_cache=False).logits.square().sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for ours, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, expected)


def test_layers_that_share_keys_of_a_native_layer_are_native():
    model, input_ids = converted("gemma3n_text", layers=[1]), tokens()
    with torch.no_grad(), by_definition(model):
        expected = model(input_ids, use_cache=False).logits
    torch.testing.assert_close(model(input_ids).logits, expected, atol=1e-5, rtol=1e-5)


def test_another_key_tensor_is_refused():
    model = converted("gemma3n_text")
    make = model.model.layers[1].self_attn
    handle = make.register_forward_hook(
        lambda module, args, kwargs, out: kwargs["shared_kv_states"].update(
            {name: tuple(part.clone() for part in parts) for name, parts in kwargs["shared_kv_states"].items()}
        ),
        with_kwargs=True,
    )
    with pytest.raises(RuntimeError, match="the very key tensor"):
        model(tokens(), use_cache=False)
    handle.remove()


def test_a_model_that_would_drop_tokens_before_it_shares_keys_keeps_them():
    """Gemma4 slices masks of T x T tokens when only the last logits are wanted, as in generate()."""
    model, input_ids = converted("gemma4_text"), distinct_tokens()
    attention_mask = torch.ones_like(input_ids)
    attention_mask[0, :4] = 0
    with torch.no_grad():
        every = model(input_ids, attention_mask=attention_mask).logits
        last = model(input_ids, attention_mask=attention_mask, logits_to_keep=1).logits
    torch.testing.assert_close(last, every[:, -1:])
