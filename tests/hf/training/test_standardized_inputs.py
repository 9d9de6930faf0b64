"""Steps on standardised inputs are those of a layer that reads standardised inputs."""

import pytest
import torch
from torch import nn

from flash_dmattn_hf.training.standardized_inputs import StandardizedLayer, clip_each_group, standardize_inputs


def inputs():
    """200 inputs of very different size and place, and targets."""
    generator = torch.Generator().manual_seed(0)
    scale, shift = torch.tensor([0.01, 1.0, 30.0, 400.0]).double(), torch.tensor([3.0, 0.0, -50.0, 1.0]).double()
    x = torch.randn(200, 4, generator=generator, dtype=torch.float64) * scale + shift
    return x, torch.randn(200, 2, generator=generator, dtype=torch.float64)


def train(layer, x, y, optimizer, steps=20):
    for _ in range(steps):
        optimizer.zero_grad()
        (layer(x) - y).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("has_bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("max_norm", [None, 0.05], ids=["", "clipped"])
def test_the_steps_are_those_of_a_layer_that_reads_standardised_inputs(has_bias, max_norm):
    x, y = inputs()
    mean, std = (x.mean(0) if has_bias else torch.zeros(4).double()), x.std(0)
    torch.manual_seed(0)
    plain = nn.Linear(4, 2, bias=has_bias).double()
    explicit = nn.Linear(4, 2, bias=has_bias).double()
    with torch.no_grad():
        explicit.weight.copy_(plain.weight * std)
        if has_bias:
            explicit.bias.copy_(plain.bias + plain.weight @ mean)
    optimizers = [torch.optim.AdamW(layer.parameters(), lr=0.05, weight_decay=0.0) for layer in (plain, explicit)]
    standardize_inputs(optimizers[0], [StandardizedLayer(plain, mean, std)])
    for optimizer in optimizers if max_norm else ():
        clip_each_group(optimizer, max_norm)
    start = plain(x).detach()
    train(plain, x, y, optimizers[0])
    train(explicit, (x - mean) / std, y, optimizers[1])
    assert (plain(x) - start).abs().max() > 0.5
    torch.testing.assert_close(plain(x), explicit((x - mean) / std), atol=1e-9, rtol=1e-9)


def test_a_layer_without_gradient_stays_as_it_is():
    layer, other = nn.Linear(4, 2), nn.Linear(4, 2)
    optimizer = torch.optim.AdamW([*layer.parameters(), *other.parameters()], lr=0.1)
    standardize_inputs(optimizer, [StandardizedLayer(layer, torch.ones(4), torch.ones(4))])
    before = layer.weight.detach().clone(), layer.bias.detach().clone()
    other(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    assert torch.equal(layer.weight, before[0]) and torch.equal(layer.bias, before[1])


def test_every_group_is_clipped_alone():
    parameters = [nn.Parameter(torch.zeros(4)), nn.Parameter(torch.zeros(9))]
    optimizer = torch.optim.SGD([{"params": [parameter]} for parameter in parameters], lr=1.0)
    clip_each_group(optimizer, 1.0)
    parameters[0].grad, parameters[1].grad = torch.full((4,), 5.0), torch.full((9,), 0.1)
    optimizer.step()
    torch.testing.assert_close(parameters[0].detach(), torch.full((4,), -0.5))
    torch.testing.assert_close(parameters[1].detach(), torch.full((9,), -0.1))


def test_state_and_checkpoints_are_those_of_the_plain_optimizer():
    layer = nn.Linear(4, 2)
    optimizer = torch.optim.AdamW(layer.parameters())
    plain = optimizer.state_dict()["param_groups"]
    standardize_inputs(optimizer, [StandardizedLayer(layer, torch.ones(4), torch.ones(4))])
    assert optimizer.state_dict()["param_groups"] == plain
