"""What defines Barlow Twins and the small Swin encoder that it prepares."""

import numpy as np
import pytest
import torch

from medcook.data import IGNORE
from medcook.methods import Batch, Moment
from medcook.networks import parameters
from medcook.recipes.pretraining.barlow_swin import (
    LAMBDA,
    BarlowSwin,
    BarlowSwinNet,
    Residual,
    ShallowSwin,
    barlow_loss,
    correlation,
    recipe,
)

SMALL = BarlowSwin(width=4, hidden=6)


@pytest.fixture
def images():
    return torch.randn(3, 1, 30, 24, generator=torch.Generator().manual_seed(0))


@pytest.mark.component("pre-training by Barlow Twins")
def test_the_correlation_is_numpys():
    first, second = torch.randn(20, 4), torch.randn(20, 3)
    wanted = np.corrcoef(first.T, second.T)[:4, 4:]
    assert np.allclose(correlation(first, second), wanted, atol=1e-4)


@pytest.mark.component("pre-training by Barlow Twins")
def test_the_loss_asks_for_agreement_and_for_independence():
    rng = torch.Generator().manual_seed(0)
    independent = torch.linalg.qr(torch.randn(64, 5, generator=rng))[0]
    independent = torch.linalg.qr(independent - independent.mean(0))[0]
    assert barlow_loss(independent, 7 * independent + 3).item() == pytest.approx(0, abs=1e-2), (
        "scale and shift are free"
    )
    copies = independent[:, :1].expand(-1, 5)
    assert barlow_loss(copies, copies).item() == pytest.approx(20 * LAMBDA, abs=1e-3), "5 x 4 pairs that say the same"
    strangers = torch.linalg.qr(torch.cat([torch.ones(64, 1), torch.randn(64, 10, generator=rng)], 1))[0][:, 1:]
    assert barlow_loss(strangers[:, :5], strangers[:, 5:]).item() == pytest.approx(5, abs=0.05)


@pytest.mark.component("pre-training by Barlow Twins")
def test_the_pretext_trains_the_encoder_and_its_projector_alone(images):
    nets = SMALL.build(1, 3, 2)
    hidden = Batch(images, torch.full((3, 30, 24), IGNORE, dtype=torch.uint8))
    SMALL.training_step(nets, hidden, hidden, Moment(0, 10)).backward()
    assert all(p.grad is not None for p in nets["model"].encoder.parameters())
    assert nets["pretext"][0].weight.grad.abs().max() > 0
    assert nets["model"].head.weight.grad is None and nets["model"].up[0].around[0].weight.grad is None


@pytest.mark.component("shallow Swin encoder")
def test_a_stage_halves_the_grid_and_doubles_the_features():
    found = ShallowSwin(2, 4)(torch.randn(1, 2, 32, 16))
    assert [tuple(x.shape[1:]) for x in found] == [(4, 16, 8), (8, 8, 4), (16, 4, 2)]


@pytest.mark.component("shallow Swin encoder")
def test_attention_stays_within_windows_that_the_second_block_shifts_by_one():
    net = ShallowSwin(1, 4).eval()
    image = torch.zeros(1, 1, 32, 32, requires_grad=True)
    first = net.stages[0][0](net.embed(image).permute(0, 2, 3, 1))
    first[0, 0, 0].sum().backward()
    seen = (image.grad[0, 0] != 0).nonzero()
    assert seen.max() < 8, "4 x 4 tokens of 2 x 2 pixels"
    image.grad = None
    net(image)[0][0, :, 0, 0].sum().backward()
    assert (image.grad[0, 0] != 0).nonzero().max() < 12 and [block.shift for block in net.stages[0]] == [0, 1]


@pytest.mark.component("decoder of separable residual convolutions")
def test_convolutions_are_separable_and_residual():
    block = Residual(6, 4).eval()
    weights = [tuple(module.weight.shape) for module in block.inner.modules() if isinstance(module, torch.nn.Conv2d)]
    assert weights == [(6, 1, 3, 3), (4, 6, 1, 1), (4, 1, 3, 3), (4, 4, 1, 1)]
    torch.nn.init.zeros_(block.inner[1][1].weight)
    x = torch.randn(2, 6, 8, 8)
    assert torch.allclose(block(x), block.around(x)), "without the convolutions the way around is left"


@pytest.mark.component("decoder of separable residual convolutions")
def test_every_skip_matters_and_any_size_comes_back(images):
    net = BarlowSwinNet(inputs=1, classes=3, width=4)
    out = net(images)
    assert out.shape == (3, 3, 30, 24)
    out.square().sum().backward()
    assert all(p.grad is not None for p in net.parameters())
    for block, skip in ((net.up[0], 8), (net.up[1], 4), (net.last, 1)):
        assert block.around[0].weight.grad[:, -skip:].abs().max() > 0


def test_who_waits_is_the_same_network_without_a_pretext(images):
    waits = BarlowSwin(width=4, hidden=6, waits=True)
    nets = waits.build(1, 3, 2)
    batch = Batch(images, torch.randint(0, 3, (3, 30, 24), dtype=torch.uint8))
    waits.training_step(nets, batch, batch, Moment(0, 10)).backward()
    assert "pretext" not in nets and all(p.grad is None for p in nets.parameters())
    assert parameters(nets["model"]) == parameters(SMALL.build(1, 3, 2)["model"])
    waits.training_step(nets, batch, batch, Moment(5, 10)).backward()
    assert all(p.grad is not None for p in nets["model"].parameters())


def test_it_has_fewer_parameters_than_the_u_net_it_is_compared_with():
    counts = {arm: parameters(recipe.method("full", arm).build(1, 4, 2)) for arm in recipe.compare}
    assert counts["barlow-swin"] < 0.4 * counts["unet"]
