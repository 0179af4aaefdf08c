"""Muon: orthogonal updates for matrices and convolutions, AdamW for the rest, and a state that can be kept."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from sdcompress.train.muon import Muon, make_muon, make_orthogonal


class Net(nn.Module):
    """A network with an end, a convolution, a matrix and a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(3, 8, 3, padding=1)
        self.inner = nn.Conv2d(8, 8, 3, padding=1)
        self.linear = nn.Linear(8, 8)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.linear(self.inner(self.conv_in(pixels)).mean((2, 3)))


def train(net: Net, optimizer: torch.optim.Optimizer, steps: int, first: int = 0) -> float:
    """Train on fixed random targets; returns the last loss."""
    loss = torch.tensor(0.0)
    for step in range(first, first + steps):
        generator = torch.Generator().manual_seed(step % 2)
        pixels, target = torch.randn(4, 3, 6, 6, generator=generator), torch.randn(4, 8, generator=generator)
        optimizer.zero_grad()
        loss = (net(pixels) - target).square().mean()
        loss.backward()
        optimizer.step()
    return loss.item()


def make(seed: int = 0) -> tuple[Net, Muon]:
    torch.manual_seed(seed)
    net = Net()
    return net, make_muon(dict(net.named_parameters()), 0.02, 0.0)


@pytest.mark.parametrize("shape", [(2, 16, 48), (1, 48, 16), (3, 20, 20)])
def test_updates_are_nearly_orthogonal(shape: tuple[int, ...]) -> None:
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    singular = torch.linalg.svdvals(make_orthogonal(matrices))
    assert singular.min() > 0.4
    assert singular.max() < 1.4


def test_the_loss_falls() -> None:
    net, optimizer = make()
    before = train(net, optimizer, 1)
    assert train(net, optimizer, 80) < 0.5 * before


def test_ends_and_biases_are_left_to_adamw() -> None:
    net, optimizer = make()
    by_muon, by_adamw = ({id(p) for p in group["params"]} for group in optimizer.param_groups)
    assert by_muon == {id(net.inner.weight), id(net.linear.weight)}
    assert by_adamw == {id(p) for p in (net.conv_in.weight, net.conv_in.bias, net.inner.bias, net.linear.bias)}


def test_a_run_that_is_resumed_equals_one_that_is_not() -> None:
    whole, optimizer = make()
    train(whole, optimizer, 10)
    half, optimizer = make()
    train(half, optimizer, 5)
    resumed, fresh = make(seed=1)
    resumed.load_state_dict(half.state_dict())
    fresh.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(resumed, fresh, 5, first=5)
    for name, weight in whole.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[name], weight, rtol=0, atol=0)


def test_a_weight_without_a_gradient_keeps_its_value() -> None:
    net, optimizer = make()
    before = net.linear.weight.clone()
    net.conv_in(torch.randn(1, 3, 6, 6)).mean().backward()
    optimizer.step()
    torch.testing.assert_close(net.linear.weight, before, rtol=0, atol=0)
