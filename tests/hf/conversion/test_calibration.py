"""Calibration: the streamed regression is the plain one, the attention is the dense one, A stays harmless."""

import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AttentionInterface, AttentionMaskInterface

from flash_dmattn_hf import DynamicMaskConfig, iter_gates
from flash_dmattn_hf.conversion.attention_mass import QUERY_BLOCK, attention_and_mass, far_queries
from flash_dmattn_hf.conversion.calibration import (
    MASS_FLOOR,
    MIN_FAR_QUERIES,
    Calibration,
    calibrate,
    required_tokens,
    usable_keys,
)
from flash_dmattn_hf.conversion.ridge import RidgeStatistics, fit
from flash_dmattn_hf.gates.attach import attach, plan
from flash_dmattn_hf.integration.observed_attention import observed_attention

from ..tiny import build, tiny_config, tiny_model, tokens

WINDOW = DynamicMaskConfig(keep_window_size=32, num_sink_tokens=3, local_window_size=16)
STRETCH = 160


def gated(model_type, config=WINDOW, **overrides):
    model = tiny_model(model_type, initializer_range=0.3, **overrides)
    attach(model, plan(model, config))
    return model


def dense_probabilities(query, key, *, softmax_scale, softcap=None, sliding_window=None):
    """(H, T, T) float64, from the definition."""
    key = key.repeat_interleave(len(query) // len(key), 0)
    logits = query.double() @ key.double().mT * softmax_scale
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    position = torch.arange(query.shape[1])
    age = position[:, None] - position
    hidden = (age < 0) | (age >= (sliding_window or query.shape[1]))
    return logits.masked_fill(hidden, -torch.inf).softmax(-1), age


@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_streamed_ridge_is_the_plain_one(chunk):
    torch.manual_seed(0)
    x = torch.randn(1000, 6) @ torch.randn(6, 6) + 3
    y = x @ torch.randn(6, 2) + 0.5 * torch.randn(1000, 2) - 20
    statistics = RidgeStatistics(6, 2)
    for start in range(0, 1000, chunk):
        statistics.add(x[start : start + chunk], y[start : start + chunk])
    weight, intercept = statistics.solve(0.1)
    x, y = x.double(), y.double()
    centered = x - x.mean(0)
    penalty = 0.1 * centered.var(0, unbiased=False).mean() * 1000
    expected = torch.linalg.solve(centered.T @ centered + penalty * torch.eye(6), centered.T @ (y - y.mean(0))).T
    torch.testing.assert_close(weight, expected, rtol=1e-7, atol=1e-9)
    residual = y - x @ weight.T - intercept
    r2 = 1 - residual.square().sum(0) / (y - y.mean(0)).square().sum(0)
    torch.testing.assert_close(statistics.r2(weight, intercept), r2, rtol=1e-6, atol=1e-8)


def test_fit_reports_r2_of_keys_it_has_not_seen():
    torch.manual_seed(0)
    train, held_out = RidgeStatistics(40, 1), RidgeStatistics(40, 1)
    train.add(torch.randn(60, 40), torch.randn(60, 1))
    held_out.add(torch.randn(60, 40), torch.randn(60, 1))
    noise = fit(train, held_out)[2]
    assert noise.item() < 0.1
    assert train.r2(*train.solve(1e-4)).item() > 0.5


@pytest.mark.parametrize("length", [1, QUERY_BLOCK - 1, QUERY_BLOCK, 2 * QUERY_BLOCK + 37])
@pytest.mark.parametrize("distance", [0, 1, 50, 1000])
@pytest.mark.parametrize(
    "options", [{}, {"softcap": 2.0}, {"sliding_window": 70}], ids=["plain", "softcap", "sliding"]
)
def test_attention_and_mass_follow_the_definition(length, distance, options):
    torch.manual_seed(length)
    query, key, value = torch.randn(6, length, 8), torch.randn(2, length, 8), torch.randn(2, length, 8)
    out, mass = attention_and_mass(query, key, value, distance=distance, softmax_scale=0.7, **options)
    probabilities, age = dense_probabilities(query, key, softmax_scale=0.7, **options)
    torch.testing.assert_close(out.double(), probabilities @ value.double().repeat_interleave(3, 0), rtol=0, atol=1e-5)
    torch.testing.assert_close(mass.double(), (probabilities * (age >= distance)).sum(1), rtol=0, atol=1e-4)
    seen = (age >= max(distance, 0)) & (age >= 0) & (age < options.get("sliding_window", length))
    assert torch.equal(far_queries(length, distance, options.get("sliding_window")), seen.sum(0))


class LargestTensor(TorchDispatchMode):
    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.numel = max(self.numel, out.numel())
        return out


def test_attention_and_mass_hold_no_square_of_the_length():
    length = 16 * QUERY_BLOCK
    tensor = torch.randn(2, length, 4)
    with LargestTensor() as largest:
        attention_and_mass(tensor, tensor, tensor, distance=5, softmax_scale=1.0)
    assert largest.numel <= 2 * length * QUERY_BLOCK


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gemma2", "gpt2", "opt", "cohere2", "qwen3_next", "llava"])
def test_observed_attention_is_the_dense_model(model_type):
    model = gated(model_type)
    model.set_attn_implementation("eager")  # sdpa of some versions drops the softcap
    ids = tokens(1, 40)
    expected = model(ids).logits
    seen = []

    def compute(module, query, key, value, softmax_scale, softcap):
        seen.append(module)
        options = {"softcap": softcap, "sliding_window": module.dma.sliding_window}
        return attention_and_mass(
            query[0], key[0], value[0], distance=0, softmax_scale=softmax_scale, **options
        )[0][None]

    modules = [module for _, module, _ in iter_gates(model)]
    with observed_attention(modules, compute):
        observed = model(ids).logits
    assert seen == modules
    torch.testing.assert_close(observed, expected, rtol=0, atol=1e-4)


def test_observed_attention_leaves_nothing_behind():
    model = gated("llama")
    modules = [module for _, module, _ in iter_gates(model)]
    before = model.config._attn_implementation, set(AttentionInterface()), set(AttentionMaskInterface())
    with pytest.raises(ZeroDivisionError), observed_attention(modules, lambda *_: 1 / 0):
        model(tokens(1, 8))
    assert before == (model.config._attn_implementation, set(AttentionInterface()), set(AttentionMaskInterface()))


CASES = {
    "kv-heads": ("llama", {}),
    "query-heads": ("llama", {"importance_heads": "query"}),
    "zoh-bias": ("llama", {"importance": "zoh", "dt_proj_bias": True}),
    "softcap": ("gemma2", {}),
    "above-sliding-window": ("mistral", {}),
    "one-for-all-heads": ("llama", {"importance_heads": "shared"}),
    "latents-hidden-states": ("deepseek_v3", {"importance_input": "hidden", "importance_heads": "shared"}),
    "hidden-states": ("llama", {"importance_input": "hidden"}),
    "hidden-states-softcap": ("gemma2", {"importance_input": "hidden", "importance_heads": "query"}),
}


@pytest.mark.parametrize("model_type, settings", CASES.values(), ids=CASES)
def test_importance_ranks_by_the_predicted_mass(model_type, settings):
    """The ranking by importance is that of a ridge regression made here from eager attention weights."""
    overrides = {"sliding_window": 100} if model_type == "mistral" else {}
    config = DynamicMaskConfig(**{**vars(WINDOW), **settings})
    model = gated(model_type, config, **overrides)
    ids = tokens(1, 10 * STRETCH)
    result = calibrate(model, Calibration(ids, stretch_length=STRETCH))
    assert result.num_tokens == 10 * STRETCH
    _, module, gate = list(iter_gates(model))[-1]

    model.set_attn_implementation("eager")
    sources, masses = [], []
    is_hidden = config.importance_input == "hidden"
    projection = module.v_proj if hasattr(module, "v_proj") else module.kv_a_proj_with_mqa  # both read them
    hook = projection.register_forward_hook(lambda _, args, out: sources.append(args[0][0] if is_hidden else out[0]))
    for stretch in ids[0].view(-1, STRETCH):
        weights = model(stretch[None], output_attentions=True).attentions[module.layer_idx][0]
        position = torch.arange(STRETCH)
        age = position[:, None] - position
        seen = (age >= 16) & (age < (gate.sliding_window or STRETCH))
        usable = (seen.sum(0) >= MIN_FAR_QUERIES) & (position >= 3)
        mean = (weights.detach().double() * seen).sum(1) / seen.sum(0)
        masses.append(mean.view(gate.num_importance_heads, -1, STRETCH).mean(1)[:, usable].T)
    hook.remove()
    x = torch.cat([source.detach().double()[usable] for source in sources])
    y = (torch.cat(masses) + MASS_FLOOR).log()
    statistics = RidgeStatistics(x.shape[1], y.shape[1])
    statistics.add(x, y)

    everything = torch.cat(sources).detach()
    heads = everything.view(-1, *gate.source_shape).transpose(0, 1)[None]
    importance = gate(heads)[0].double()
    correlations = []
    for ridge in (1e-4, 1e-3, 1e-2, 1e-1, 1.0):
        prediction = statistics.solve(ridge)[0] @ everything.double().T
        ranks = [tensor.argsort(-1).argsort(-1).double() for tensor in (prediction, importance)]
        correlations.append(torch.stack([torch.corrcoef(torch.stack(pair))[0, 1] for pair in zip(*ranks, strict=True)]))
    assert torch.stack(correlations).min(1).values.max() > 0.9999


@pytest.mark.parametrize("settings", [settings for _, settings in CASES.values()][:3], ids=list(CASES)[:3])
def test_bias_spread_is_small_and_A_positive(settings):
    model = gated("llama", DynamicMaskConfig(**{**vars(WINDOW), **settings}))
    ids = tokens(1, 10 * STRETCH)
    calibrate(model, Calibration(ids, stretch_length=STRETCH))
    spreads = []

    def compute(module, query, key, value, softmax_scale, softcap):
        importance = module.dma(value)
        spreads.append((importance.amax((0, 2)), importance.amin((0, 2))))
        return attention_and_mass(query[0], key[0], value[0], distance=0, softmax_scale=softmax_scale)[0][None]

    with torch.no_grad(), observed_attention([module for _, module, _ in iter_gates(model)], compute):
        for stretch in ids[0].view(-1, STRETCH):
            model(stretch[None])
    high, low = (torch.stack(side).view(10, 2, -1) for side in zip(*spreads, strict=True))
    spread = high.amax(0) - low.amin(0)
    assert spread.max() < 1e-3 and spread.min() > 1e-4
    assert all((gate.A > 0).all() for _, _, gate in iter_gates(model))


def test_too_short_a_text_names_what_is_needed():
    model = gated("llama")
    gate = next(iter_gates(model))[2]
    needed = required_tokens(gate, STRETCH)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=f"at least {needed} tokens .* got {needed - 1}"):
        calibrate(model, Calibration(tokens(1, needed - 1), stretch_length=STRETCH))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    calibrate(model, Calibration(tokens(1, needed), stretch_length=STRETCH))
    assert (gate.A > 0).all()


def test_too_short_stretches_name_what_is_needed():
    model = gated("llama")
    with pytest.raises(ValueError, match=f"= {3 + 16 + MIN_FAR_QUERIES} .* got 40"):
        calibrate(model, Calibration(tokens(1, 4000), stretch_length=40))


def test_a_sliding_window_without_far_queries_is_what_is_named():
    model = gated("mistral", sliding_window=79)
    with pytest.raises(ValueError, match="window of layer 0 must be at least .* = 80 .* got 79; with a keep"):
        calibrate(model, Calibration(tokens(1, 4000), stretch_length=STRETCH))
    calibrate(gated("mistral", sliding_window=80), Calibration(tokens(1, 40 * STRETCH), stretch_length=STRETCH))


@pytest.mark.parametrize("model_type", ["llama", "doge"])
def test_only_gates_of_our_own_can_be_calibrated(model_type):
    model = tiny_model(model_type, **({"head_dim": 8} if model_type == "doge" else {}))
    if model_type == "doge":
        model.set_attn_implementation("flash_dmattn")
    with pytest.raises(ValueError, match="must have importance gates"):
        calibrate(model, Calibration(tokens(1, 4000)))


def test_sinks_and_keys_that_few_queries_see_are_not_learned_from():
    gate = next(iter_gates(gated("llama")))[2]
    for length, fewest in ((STRETCH, MIN_FAR_QUERIES), (1016, 250)):
        usable = usable_keys(gate, length).nonzero().flatten()
        assert (usable.min(), usable.max()) == (3, length - 16 - fewest)


def test_memory_does_not_grow_with_the_text(monkeypatch):
    """No sample outlives the pass of its stretch: only sums stay."""
    model = gated("llama")
    samples, alive = [], []
    add = RidgeStatistics.add

    def watched(self, x, y):
        alive.append(sum(sample() is not None for sample in samples))
        samples.extend(weakref.ref(tensor.untyped_storage()) for tensor in (x, y))
        add(self, x, y)

    monkeypatch.setattr(RidgeStatistics, "add", watched)
    calibrate(model, Calibration(tokens(1, 12 * STRETCH), stretch_length=STRETCH))
    assert len(alive) == 12 * 2 * 2
    assert max(alive) <= 4


def test_predictions_of_any_size_keep_their_order():
    """Predictions that would saturate softplus in float32 are scaled before they become dt."""
    from flash_dmattn_hf.conversion.calibration import _write

    config = tiny_config("llama")
    model = build(config)
    attach(model, plan(model, WINDOW))
    gate = next(iter_gates(model))[2]
    weight = torch.zeros(2, 16, dtype=torch.float64)
    weight[:, 0] = 1.0
    low, high = torch.tensor([-300.0, 2.0], dtype=torch.float64), torch.tensor([100.0, 900.0], dtype=torch.float64)
    with torch.no_grad():
        _write(gate, weight, torch.zeros(2, dtype=torch.float64), low, high)
    value = torch.zeros(1, 2, 500, 8)
    value[0, 0, :, 0] = torch.linspace(-300, 900, 500)
    importance = gate(value)[0]
    inside = [(value[0, 0, :, 0] >= low[head]) & (value[0, 0, :, 0] <= high[head]) for head in range(2)]
    assert all((importance[head, inside[head]].diff() > 0).all() for head in range(2))
