"""R2U-Net: what a recurrence computes, how far it sees, and what it costs in parameters: nothing."""

import pytest
import torch
import torch.nn.functional as F

from medcook.networks import UNet, parameters
from medcook.recipes.architectures._settings import BASELINE
from medcook.recipes.architectures.r2u_net import R2U, R2UNet, RecurrentConv, RecurrentResidualBlock


def reach(module: torch.nn.Module, channels: int) -> int:
    """How many pixels away a change of the input is still noticed."""
    x = torch.ones(1, channels, 21, 21)
    other = x.clone()
    other[..., 10, 10] += 1
    noticed = (module(other) - module(x)).abs().amax((0, 1, 2)) > 0
    return int(noticed.nonzero().max()) - 10


def positive(module: torch.nn.Module) -> torch.nn.Module:
    """Positive weights, so that nothing is rectified away."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.abs_().add_(0.01)
    return module.eval()


@pytest.mark.component("recurrent convolution")
@pytest.mark.parametrize("t", [1, 2, 3])
def test_a_recurrence_sums_a_geometric_series(t):
    """Kernels that multiply by a and by b: O(t) = a x (1 + b + ... + b^t) for positive x."""
    layer = RecurrentConv(1, t).eval()
    with torch.no_grad():
        for conv, value in ((layer.feed, 0.5), (layer.recur, 0.7)):
            conv.weight.zero_()[0, 0, 1, 1] = value
    for norm in layer.norm:
        norm.eps = 0
    x = torch.rand(1, 1, 5, 5)
    assert torch.allclose(layer(x), 0.5 * x * sum(0.7**s for s in range(t + 1)))


@pytest.mark.component("recurrent convolution")
def test_steps_written_out_one_by_one():
    """t = 2 in training, where each step is normalised by its own batch."""
    layer, x = RecurrentConv(3, 2).train(), torch.randn(2, 3, 7, 6)
    weigh = lambda x, conv: F.conv2d(x, conv.weight, padding=1)  # noqa: E731
    f = lambda x: F.relu((x - x.mean((0, 2, 3), True)) / (x.var((0, 2, 3), False, keepdim=True) + 1e-5).sqrt())  # noqa: E731
    first = f(weigh(x, layer.feed))
    second = f(weigh(x, layer.feed) + weigh(first, layer.recur))
    third = f(weigh(x, layer.feed) + weigh(second, layer.recur))
    assert torch.allclose(layer(x), third, atol=1e-5)


@pytest.mark.component("recurrent convolution")
@pytest.mark.parametrize("t", [1, 2, 3])
def test_every_step_sees_a_pixel_further_with_the_same_kernels(t):
    layer = positive(RecurrentConv(2, t))
    assert reach(layer, 2) == t + 1
    kernels = [p for p in layer.parameters() if p.ndim == 4]
    assert len(kernels) == 2


@pytest.mark.component("residual unit")
def test_the_input_is_added_to_what_is_found():
    block, x = RecurrentResidualBlock(3, 5).eval(), torch.randn(2, 3, 8, 8)
    narrow = block.project(x)
    assert torch.allclose(block(x), narrow + block.recurrent(narrow))
    with torch.no_grad():
        for conv in (block.recurrent[1].feed, block.recurrent[1].recur):
            conv.weight.zero_()
    assert torch.allclose(block(x), narrow)  # nothing found: the identity is left


@pytest.mark.component("RU-Net")
def test_without_residual_nothing_is_added():
    block, x = RecurrentResidualBlock(3, 5, residual=False).eval(), torch.randn(2, 3, 8, 8)
    assert torch.equal(block(x), block.recurrent(block.project(x))) and block(x).min() >= 0
    counts = [parameters(R2U(residual=residual).model(1, 4)) for residual in (True, False)]
    assert counts[0] == counts[1]


@pytest.mark.component("same number of parameters")
def test_it_has_as_many_parameters_as_the_u_net():
    book = parameters(UNet(inputs=1, classes=4, channels=BASELINE.channels))
    counts = {t: parameters(R2U(t=t).model(1, 4)) for t in (0, 2, 3)}
    assert abs(counts[2] / book - 1) < 0.05
    assert abs(counts[0] / counts[2] - 1) < 0.005 and abs(counts[3] / counts[2] - 1) < 0.005


@pytest.mark.parametrize("size", [(32, 32), (40, 36), (33, 47)])
def test_any_size_comes_back(size):
    network = R2UNet(inputs=1, classes=3, channels=(4, 8, 8))
    assert network(torch.randn(2, 1, *size)).shape == (2, 3, *size)


def test_the_ablation_uses_the_same_kernels_once():
    """Parameter by parameter the same network, but for the normalisation of one step; and it sees less far."""
    full, bare = (dict(R2U(t=t, channels=(4, 8)).model(1, 3).named_parameters()) for t in (2, 0))
    assert bare.keys() < full.keys() and all("norm.2" in key for key in full.keys() - bare.keys())
    assert all(full[key].shape == bare[key].shape for key in bare)
    layer, x = RecurrentConv(3, 0).eval(), torch.randn(1, 3, 8, 8)
    once = F.relu(layer.norm[1](layer.recur(F.relu(layer.norm[0](layer.feed(x))))))
    assert torch.equal(layer(x), once) and reach(positive(layer), 3) == 2


def test_everything_is_trained():
    for method in (R2U(channels=(4, 8)), R2U(t=0, channels=(4, 8)), R2U(residual=False, channels=(4, 8))):
        network = method.model(1, 3)
        network(torch.randn(2, 1, 16, 16)).square().mean().backward()
        assert all(p.grad is not None for p in network.parameters())
