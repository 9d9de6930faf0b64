"""A model with a chunked loss trains as without, for every output layer, batch and Trainer; and is left as it was."""

import copy
import functools
import inspect
import threading
from types import MethodType

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForSequenceClassification

from flash_dmattn_hf.training import liger
from flash_dmattn_hf.training.deferred_logits import DeferredLogits
from flash_dmattn_hf.training.loss import use_chunked_loss

from ..converted import converted
from ..tiny import FAMILIES, tiny_config, tiny_model, tokens
from . import trainer_setup


def labelled():
    """Left-padded and partly unlabelled: what a Trainer gives."""
    input_ids = tokens()
    attention_mask, labels = torch.ones_like(input_ids), input_ids.clone()
    attention_mask[0, :5], labels[0, :9], labels[1, 20:] = 0, -100, -100
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels, "use_cache": False}


def of_model(model, *args, **inputs):
    """Output of one step, and its loss and gradients."""
    model.zero_grad()
    output = model(*args, **inputs)
    output.loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return output, {"loss": output.loss.detach(), **gradients}


HEADS = {
    "gemma2 with softcap": ("gemma2", {"final_logit_softcapping": 3.0}),
    "granite with scaling": ("granite", {"logits_scaling": 4.0}),
    "cohere with scaling": ("cohere", {"logit_scale": 0.25}),
    "mixtral with router loss": ("mixtral", {"output_router_logits": True}),
    "llama tied": ("llama", {"tie_word_embeddings": True}),
}


@pytest.mark.parametrize(("model_type", "values"), HEADS.values(), ids=HEADS.keys())
@pytest.mark.parametrize("items", [None, 11, torch.tensor(11)], ids=["mean", "int", "tensor"])
def test_output_layers_of_many_kinds(model_type, values, items):
    model = tiny_model(model_type, **values).train()
    inputs = {**labelled(), "num_items_in_batch": items}
    plain, expected = of_model(model, **inputs)
    with use_chunked_loss(model, chunk_size=7):
        output, got = of_model(model, **inputs)
    assert output.logits is None and plain.logits is not None
    torch.testing.assert_close(got, expected, atol=2e-6, rtol=1e-4)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_family_with_dynamic_masks(model_type):
    model = converted(model_type).float().train()
    _, expected = of_model(model, **labelled())
    with use_chunked_loss(model, chunk_size=7):
        output, got = of_model(model, **labelled())
    assert output.logits is None
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-3)


def test_logits_are_never_made(monkeypatch):
    """No tensor with an entry per token and word: the largest product has 7 tokens."""
    model, largest = tiny_model("llama").train(), []
    original = torch.nn.functional.linear

    def linear(hidden, weight, bias=None):
        if weight.shape[0] == model.config.vocab_size:
            largest.append(hidden.numel() // hidden.shape[-1])
        return original(hidden, weight, bias)

    monkeypatch.setattr(torch.nn.functional, "linear", linear)
    with use_chunked_loss(model, chunk_size=7):
        of_model(model, **labelled())
    assert max(largest) == 7 and sum(largest) == 48


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast(dtype):
    model = tiny_model("gemma2", dtype=dtype, final_logit_softcapping=3.0).train()
    with torch.autocast("cpu", torch.bfloat16):
        _, expected = of_model(model, **labelled())
        with use_chunked_loss(model, chunk_size=7):
            _, got = of_model(model, **labelled())
    for name, tensor in expected.items():
        assert got[name].dtype == tensor.dtype
        assert (got[name] - tensor).norm() <= 0.02 * tensor.norm() + 1e-6, name


def test_labels_that_are_shifted_already():
    model = tiny_model("llama").train()
    inputs = labelled()
    shifted = torch.nn.functional.pad(inputs["labels"], (0, 1), value=-100)[:, 1:]
    _, expected = of_model(model, **inputs)
    with use_chunked_loss(model, chunk_size=7):
        _, got = of_model(model, **inputs, shift_labels=shifted)
        by_position = inputs["input_ids"], inputs["attention_mask"], None, None, None, inputs["labels"]
        _, positional = of_model(model, *by_position)
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(positional, expected, atol=1e-6, rtol=1e-5)


def test_evaluation_is_chunked_too_unless_it_needs_logits():
    model, inputs = tiny_model("llama"), labelled()
    with torch.no_grad():
        expected = model(**inputs)
        with use_chunked_loss(model, chunk_size=7):
            output = model(**inputs)
        with use_chunked_loss(model, in_evaluation=False):
            with_logits = model(**inputs)
    assert output.logits is None and not output.loss.requires_grad
    torch.testing.assert_close(output.loss, expected.loss, atol=1e-6, rtol=1e-6)
    assert torch.equal(with_logits.logits, expected.logits) and torch.equal(with_logits.loss, expected.loss)


def test_a_tuple_comes_without_logits_as_well():
    model = tiny_model("llama").train()
    with use_chunked_loss(model):
        output = model(**labelled(), return_dict=False, output_hidden_states=True)
    assert len(output) == 2 and output[0].dim() == 0 and len(output[1]) == 3


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_it_compiles_to_one_graph(backend):
    torch.compiler.reset()
    model = converted("gemma2").float().train()
    use_chunked_loss(model, chunk_size=7)
    _, expected = of_model(model, **labelled())
    other = copy.deepcopy(model)
    output = torch.compile(other, fullgraph=True, backend=backend)(**labelled())
    output.loss.backward()
    assert output.logits is None
    got = {name: p.grad for name, p in other.named_parameters() if p.grad is not None}
    torch.testing.assert_close({"loss": output.loss.detach(), **got}, expected, atol=1e-5, rtol=1e-4)


def test_calls_without_labels_are_as_before():
    model, input_ids = tiny_model("llama"), tokens()
    options = {"max_new_tokens": 3, "do_sample": False}
    expected, generated = model(input_ids).logits, model.generate(input_ids, **options)
    with use_chunked_loss(model):
        assert torch.equal(model(input_ids).logits, expected)
        assert torch.equal(model.generate(input_ids, **options), generated)


def test_another_thread_gets_its_logits_meanwhile():
    model, input_ids, found = tiny_model("llama"), tokens(), []
    expected, caller = model(input_ids).logits, threading.current_thread()

    def call_in_another_thread(*_):
        if threading.current_thread() is caller:
            thread = threading.Thread(target=lambda: found.append(model(input_ids).logits))
            thread.start()
            thread.join()

    model.model.register_forward_hook(call_in_another_thread)
    with use_chunked_loss(model):
        assert model(**labelled()).logits is None
    assert torch.equal(found[0], expected)


def test_it_is_undone_cleanly():
    model = tiny_model("llama").train()
    expected, before, signature = model(**labelled()), dict(vars(model)), inspect.signature(model.forward)
    chunked = use_chunked_loss(model)
    assert inspect.signature(model.forward) == signature
    with pytest.raises(ValueError, match="has a chunked loss already"):
        use_chunked_loss(model)
    for _ in range(2):
        chunked.remove()
        assert vars(model) == before and type(model.lm_head) is nn.Linear
        assert torch.equal(model(**labelled()).logits, expected.logits)


def test_it_is_undone_after_an_exception_in_the_forward():
    model = tiny_model("llama").train()
    with pytest.raises(ValueError, match="labels must have shape"), use_chunked_loss(model):
        model(tokens(), labels=tokens(length=7))
    assert model(**labelled()).logits is not None


def test_under_another_wrapper_of_the_forward_it_passes_everything_on():
    model = tiny_model("llama").train()
    expected = model(**labelled()).logits
    chunked = use_chunked_loss(model)
    inner = model.forward
    model.forward = MethodType(lambda self, *args, **kwargs: inner(*args, **kwargs), model)
    assert model(**labelled()).logits is None
    chunked.remove()
    assert torch.equal(model(**labelled()).logits, expected)


def test_it_can_be_used_on_a_forward_that_is_wrapped_already():
    model = tiny_model("llama").train()
    inner = model.forward.__func__
    model.forward = MethodType(
        functools.wraps(inner)(lambda self, *args, **kwargs: inner(self, *args, **kwargs)), model
    )
    outer = model.forward
    with use_chunked_loss(model):
        assert model(**labelled()).logits is None
    assert model.forward is outer and model(**labelled()).logits is not None


def test_a_copy_has_weights_of_its_own():
    model = tiny_model("llama").train()
    chunked = use_chunked_loss(model, chunk_size=7)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.lm_head.weight.mul_(3)
    chunked.remove()
    output, got = of_model(other, **labelled())
    assert output.logits is None and model(**labelled()).logits is not None
    _, unchanged = of_model(model, **labelled())
    with torch.no_grad():
        model.lm_head.weight.mul_(3)
    _, expected = of_model(model, **labelled())
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-5)
    assert (got["loss"] - unchanged["loss"]).abs() > 1e-3


def test_it_leaves_nothing_in_a_checkpoint(tmp_path):
    model = tiny_model("llama")
    model.save_pretrained(tmp_path / "plain")
    use_chunked_loss(model)
    model.save_pretrained(tmp_path / "chunked")
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "plain" / file).read_bytes() == (tmp_path / "chunked" / file).read_bytes()


def test_lora():
    model = get_peft_model(converted("llama").float(), LoraConfig(target_modules="all-linear", modules_to_save=["dma"]))
    model.train()
    _, expected = of_model(model, **labelled())
    with use_chunked_loss(model, chunk_size=7):
        output, got = of_model(model, **labelled())
    assert output.logits is None
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)


OPTIONS = {
    "plain": {},
    "gradient checkpointing": {"gradient_checkpointing": True},
    "accumulation": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
    "bf16 autocast": {"bf16": True},
    "torch_compile": {"torch_compile": True, "torch_compile_backend": "aot_eager"},
}


@pytest.mark.parametrize(
    ("batches", "option"),
    [*(("padded", option) for option in OPTIONS), ("packed", "accumulation"), ("packed with cu_seqlens", "plain")],
)
def test_an_unmodified_trainer_gets_the_same_weights_and_losses(tmp_path, batches, option):
    torch.compiler.reset()
    results = []
    for is_chunked in (False, True):
        model = trainer_setup.make_model(spread=0.5)
        chunked = use_chunked_loss(model, chunk_size=5) if is_chunked else None
        options = {"max_steps": 3, "max_grad_norm": 0.0, "optim": "sgd", **OPTIONS[option]}
        trainer = trainer_setup.make_trainer(model, tmp_path, batches=batches, **options)
        trainer.train()
        trainer.eval_dataset = trainer_setup.make_examples()
        evaluated = trainer.evaluate()["eval_loss"]
        weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        results.append((weights, torch.tensor([*trainer_setup.losses(trainer), evaluated])))
        if is_chunked:
            assert trainer.model(**trainer_setup.pad(trainer_setup.make_examples())).logits is None
            chunked.remove()
            assert trainer.model(**trainer_setup.pad(trainer_setup.make_examples())).logits is not None
    rounding = {"atol": 2e-3, "rtol": 2e-2} if option == "bf16 autocast" else {"atol": 2e-6, "rtol": 1e-4}
    torch.testing.assert_close(results[1], results[0], **rounding)


class Odd(nn.Module):
    """Does something to its argument that no chunk of it could undergo."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, logits):
        return self.function(logits)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda logits: logits[..., :5], "indexing"),
        (lambda logits: torch.sigmoid(logits), "sigmoid"),
        (lambda logits: logits * torch.ones(1), r"\* a Tensor"),
        (lambda logits: torch.ones(1) * logits, r"\* a Tensor"),
    ],
)
def test_it_never_ignores_what_happens_to_logits(function, message):
    logits = DeferredLogits(torch.zeros(1, 2, 3), torch.zeros(7, 3), None, None, "auto")
    with pytest.raises(TypeError, match=f"the chunked loss cannot follow .*: .*{message}"):
        Odd(function)(logits)


def test_it_refuses_models_that_it_cannot_serve():
    classifier = AutoModelForSequenceClassification.from_config(tiny_config("llama"))
    with pytest.raises(ValueError, match="must have transformers' causal language model loss, got LlamaForSequence"):
        use_chunked_loss(classifier)
    with pytest.raises(ValueError, match="must be a model of transformers, got Linear"):
        use_chunked_loss(nn.Linear(2, 2))
    model = tiny_model("llama")
    model.set_output_embeddings(nn.Sequential(model.lm_head))
    with pytest.raises(
        ValueError, match="output layer of LlamaForCausalLM must be a plain nn.Linear .* got Sequential"
    ):
        use_chunked_loss(model)


def test_it_refuses_a_weight_that_is_gone_after_its_layer():
    """As when the output layer is sharded by itself: its weight is whole only while the layer runs."""
    model = tiny_model("llama").train()

    def free(module, args, output):
        module.weight.data.untyped_storage().resize_(0)

    model.lm_head.register_forward_hook(free)
    with use_chunked_loss(model), pytest.raises(ValueError, match="needs the whole weight of the output layer"):
        model(**labelled())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"engine": "cuda"}, r"engine must be one of \['auto', 'liger', 'torch'\], got 'cuda'"),
        ({"chunk_size": 0}, "chunk_size must be None or an integer of at least 1, got 0"),
    ],
)
def test_it_refuses_options(options, message):
    with pytest.raises(ValueError, match=message):
        use_chunked_loss(tiny_model("llama"), **options)


def test_liger_is_refused_with_its_reason(monkeypatch):
    model = tiny_model("llama").train()
    monkeypatch.setattr(liger, "is_installed", lambda: False)
    with pytest.raises(ValueError, match="engine must be auto or torch where liger-kernel is not installed"):
        use_chunked_loss(model, engine="liger")
    monkeypatch.setattr(liger, "is_installed", lambda: True)
    with use_chunked_loss(model):  # "auto" does without it
        model(**labelled())
    with use_chunked_loss(model, engine="liger"), pytest.raises(ValueError, match="run on a GPU, not on cpu"):
        model(**labelled())


@pytest.mark.parametrize(
    ("operations", "softcap"),
    [("", None), ("float32", None), ("/30.0,tanh,*30.0", "30.0"), ("float32,/1e-05,tanh,*1e-05", "1e-05")],
)
def test_liger_is_told_the_softcap(operations, softcap):
    match = liger.SOFTCAP.fullmatch(operations)
    assert (match and match[1]) == softcap


@pytest.mark.parametrize("operations", ["*2.0", "/30.0,tanh,*20.0", "/30.0,tanh", "/30.0,tanh,*30.0,*2.0"])
def test_liger_knows_no_other_operations(operations):
    assert liger.SOFTCAP.fullmatch(operations) is None
