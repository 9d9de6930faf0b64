"""KLD, top-1 agreement and loss against dense, made in chunks, are those of all logits at once."""

import math

import pytest
import torch
from torch import nn

from flash_dmattn_hf import DynamicMaskConfig, convert_model, iter_gates
from flash_dmattn_hf.conversion.variants import dense
from flash_dmattn_hf.evaluation import agreement, perplexity, share_of_gap
from flash_dmattn_hf.evaluation.final_states import FinalStates, logits_of_rows

from ..tiny import tiny_model, tokens

WINDOW = DynamicMaskConfig(keep_window_size=16, num_sink_tokens=2, local_window_size=8)
TEXT = tokens(1, 200)
FAMILIES = ["llama", "gemma2", "granite", "cohere", "gpt2", "opt", "qwen3_next", "llava"]


def converted(model_type="llama", **options):
    """A float64 model whose keys differ in importance."""
    model = convert_model(tiny_model(model_type, initializer_range=0.3, **options).double(), WINDOW)
    for _, _, gate in iter_gates(model):
        nn.init.normal_(gate.A, std=2.0, generator=torch.Generator().manual_seed(1))
    return model


@torch.no_grad()
def brute_force(model, reference, stretches, first_row):
    """KLD, top-1, loss and reference loss from all logits of all stretches."""
    parts = []
    for ids in stretches:
        with dense(reference):
            expected = reference(ids[None]).logits[0].double().log_softmax(-1)
        found = model(ids[None]).logits[0].double().log_softmax(-1)
        for row in range(first_row, len(ids) - 1):
            kld = sum(math.exp(p) * (p - q) for p, q in zip(expected[row].tolist(), found[row].tolist(), strict=True))
            same = float(expected[row].argmax() == found[row].argmax())
            parts.append((kld, same, -found[row, ids[row + 1]].item(), -expected[row, ids[row + 1]].item()))
    return [sum(column) / len(parts) for column in zip(*parts, strict=True)], len(parts)


@torch.no_grad()
@pytest.mark.parametrize("model_type", FAMILIES)
def test_rows_are_those_of_all_logits(model_type):
    model, ids = tiny_model(model_type, initializer_range=0.3).double(), tokens(1, 30)[0]
    whole = model(ids[None], use_cache=False).logits[0]
    rows = torch.tensor([0, 7, 8, 29])
    torch.testing.assert_close(logits_of_rows(model, ids, rows), whole[rows], rtol=1e-10, atol=1e-10)
    states = FinalStates(model, ids)
    for chunk in (slice(0, 1), slice(3, 17), slice(17, 30)):
        torch.testing.assert_close(states.logits(chunk), whole[chunk], rtol=1e-10, atol=1e-10)
    assert not model.get_output_embeddings()._forward_pre_hooks


@pytest.mark.parametrize("model_type", ["llama", "gemma2"])
def test_logits_of_all_rows_never_exist(model_type):
    model, sizes = converted(model_type), []
    model.get_output_embeddings().register_forward_hook(lambda module, inputs, output: sizes.append(output.shape[1]))
    agreement(model, TEXT, context_length=100, first_row=16, chunk_size=8)
    assert max(sizes) == 8


def test_a_model_with_an_adapter():
    peft = pytest.importorskip("peft", reason="peft is an optional dependency")
    options = peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = peft.get_peft_model(converted(), options).double().eval()
    found = agreement(model, TEXT, context_length=100, first_row=16)
    expected, _ = brute_force(model, model, TEXT.view(2, 100), 16)
    assert found[:4] == pytest.approx(expected, abs=1e-10) and found.kld > 1e-3


def test_a_model_without_an_output_layer_is_refused():
    with pytest.raises(ValueError, match="model must have an output layer, got LlamaModel"):
        logits_of_rows(tiny_model("llama").model, tokens(1, 4)[0], torch.tensor([0]))


def test_a_model_that_goes_round_its_output_layer_is_refused():
    model = tiny_model("llama")
    model.get_output_embeddings = lambda: nn.Linear(1, 1)
    with pytest.raises(ValueError, match="must call its output layer, which LlamaForCausalLM does not"):
        logits_of_rows(model, tokens(1, 4)[0], torch.tensor([0]))


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_a_model_agrees_with_itself(model_type):
    model = tiny_model(model_type, initializer_range=0.3)
    found = agreement(model, TEXT, context_length=60, first_row=0)
    assert (found.kld, found.top1, found.num_rows) == (0.0, 1.0, 3 * 59)
    assert found.loss == found.reference_loss > 0


@pytest.mark.parametrize("chunk_size", [1, 7, 10**6])
def test_chunks_are_the_whole(chunk_size):
    model = converted()
    expected, count = brute_force(model, model, TEXT.view(2, 100), 16)
    found = agreement(model, TEXT, context_length=100, first_row=16, chunk_size=chunk_size)
    assert found[:4] == pytest.approx(expected, abs=1e-10) and found.num_rows == count == 2 * 83
    assert found.kld > 1e-3 and found.top1 < 1
    assert found.perplexity == pytest.approx(math.exp(found.loss))


def test_another_reference():
    model, teacher = converted(), converted(seed=1)
    expected, _ = brute_force(model, teacher, TEXT.view(4, 50), 20)
    found = agreement(model, TEXT, context_length=50, first_row=20, reference=teacher)
    assert found[:4] == pytest.approx(expected, abs=1e-10)
    assert found.reference_loss != pytest.approx(found.loss)


def test_the_loss_is_that_of_the_perplexity():
    model = converted()
    found = agreement(model, TEXT, context_length=50, first_row=20, max_stretches=3)
    scored = perplexity(model, TEXT, context_length=50, score_last=29, max_stretches=3)
    assert found.num_rows == scored.num_tokens == 3 * 29
    assert found.loss == pytest.approx(scored.nll, abs=1e-6)  # in float32 there


def test_rows_within_the_window_agree():
    model = convert_model(tiny_model("llama", initializer_range=0.3).double(), WINDOW)
    inside = agreement(model, TEXT, context_length=16, first_row=0)
    beyond = agreement(model, TEXT, context_length=50, first_row=16)
    assert inside.kld < 1e-12 < 1e-3 < beyond.kld and inside.top1 == 1


def test_leading_tokens_stand_before_every_stretch():
    model = converted()
    stretches = torch.cat([torch.ones(4, 1, dtype=torch.long), TEXT[0, :196].view(4, 49)], 1)
    expected, _ = brute_force(model, model, stretches, 20)
    found = agreement(model, TEXT, context_length=50, first_row=20, leading=[1])
    assert found[:4] == pytest.approx(expected, abs=1e-10)


def test_tokens_that_are_ruled_out_count_for_nothing():
    model = tiny_model("llama", initializer_range=0.3)
    model.lm_head.register_forward_hook(
        lambda module, inputs, logits: logits.index_fill(-1, torch.tensor([0]), -torch.inf)
    )
    found = agreement(model, TEXT, context_length=60, first_row=0)
    assert (found.kld, found.top1) == (0.0, 1.0) and math.isfinite(found.loss)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"first_row": 49}, "first_row must be from 0 to context_length - 2 = 48, got 49"),
        ({"first_row": -1}, "first_row must be from 0"),
        ({"chunk_size": 0}, "chunk_size must be at least 1, got 0"),
        ({"leading": [1] * 50}, "leading must have fewer than 50 tokens, got 50"),
        ({"context_length": 201}, "input_ids must hold at least 201 tokens, got 200"),
        ({"max_stretches": 0}, "max_stretches must be at least 1, got 0"),
        ({"reference": tiny_model("llama", vocab_size=120)}, "must have the vocabulary of model, 99 tokens, got 120"),
    ],
    ids=lambda value: "" if isinstance(value, str) else next(iter(value)),
)
def test_what_is_wrong_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        agreement(tiny_model("llama"), TEXT, **{"context_length": 50, "first_row": 16, **options})


def test_the_share_of_the_gap():
    assert share_of_gap(2.0, 3.0, 1.0) == 0.5
    assert share_of_gap(3.0, 3.0, 1.0) == 0 and share_of_gap(1.0, 3.0, 1.0) == 1
    assert share_of_gap(4.0, 3.0, 1.0) == -0.5
    assert share_of_gap(1.0, 1.0, 1.0) is None and share_of_gap(1.0, 1.0, 2.0) is None
