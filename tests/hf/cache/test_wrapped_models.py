"""A cache is made for whatever holds the model: PEFT's wrapper, a compiled model, DDP."""

import pytest
import torch
from torch import nn

from flash_dmattn_hf import DynamicMaskCache, iter_gates

from ..generation_models import greedy, make_model, make_prompt


def peft(model):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["dma"], task_type="CAUSAL_LM")
    return peft.get_peft_model(model, config).eval()


@pytest.fixture
def ddp(tmp_path):
    """Wraps a model for the only process of a group."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield nn.parallel.DistributedDataParallel
    torch.distributed.destroy_process_group()


def check(wrapped, model):
    ids, mask = make_prompt()
    cache = DynamicMaskCache(wrapped)
    assert cache.belongs_to(wrapped) and cache.belongs_to(model)
    assert len(cache.mask_layers) == len(list(iter_gates(wrapped))) == 2
    with torch.no_grad():
        logits = [wrapped(token.view(1, 1), past_key_values=cache, use_cache=True).logits for token in ids[0]]
        expected = wrapped(ids, attention_mask=mask, use_cache=False).logits
    torch.testing.assert_close(torch.cat(logits, 1), expected, atol=1e-7, rtol=1e-7)
    assert cache.max_keys == 16


@pytest.mark.parametrize("wrap", [peft, lambda model: torch.compile(model, backend="eager")], ids=["peft", "compiled"])
def test_a_wrapped_model(wrap):
    torch.compiler.reset()
    model = make_model("llama-sinks-local")
    check(wrap(model), model)


def test_a_model_of_ddp(ddp):
    model = make_model("llama-sinks-local")
    check(ddp(model), model)


def test_generation_through_peft():
    wrapped, (ids, mask) = peft(make_model("llama-sinks-local")), make_prompt()
    cache = DynamicMaskCache(wrapped)
    inputs = {"input_ids": ids, "attention_mask": mask, "past_key_values": cache}
    out = wrapped.generate(**inputs, max_new_tokens=16, do_sample=False)
    assert torch.equal(out, greedy(wrapped.get_base_model(), ids, mask, use_cache=False))
    assert cache.get_seq_length() == out.shape[1] - 1


@pytest.mark.parametrize("model", [nn.Linear(2, 2), None, "llama"])
def test_what_holds_no_model_is_refused(model):
    with pytest.raises(ValueError, match="model must be a model of transformers, got"):
        DynamicMaskCache(model)
