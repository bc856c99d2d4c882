"""Frozen features: what learns, and what stays."""

import pytest
import torch

from medcook.errors import MedcookError
from medcook.methods import Batch, Moment, frozen
from medcook.methods.frozen import FrozenImageNet
from medcook.networks.squeezenet import SqueezeNet, load_squeezenet


@pytest.fixture
def nets(monkeypatch):
    """Without the published weights: any will do here."""
    monkeypatch.setattr(frozen, "load_squeezenet", lambda: SqueezeNet(features_only=True).eval())
    torch.manual_seed(0)
    return FrozenImageNet().build(inputs=1, classes=3, dims=2)


def test_only_the_linear_layer_learns(nets):
    labels = torch.tensor([0, 1, 2]).byte().view(3, 1, 1).expand(3, 32, 32)
    loss = FrozenImageNet().training_step(nets, Batch(torch.randn(3, 1, 32, 32), labels), None, Moment(0, 10))
    loss.backward()
    learning = {name for name, p in nets.named_parameters() if p.grad is not None}
    assert learning == {"model.1.weight", "model.1.bias"}
    before = {name: p.clone() for name, p in nets.named_parameters()}
    nets["model"][1].weight.data.add_(1)
    FrozenImageNet().after_step(nets, Moment(0, 10))
    assert not torch.equal(nets["average"][1].weight, before["average.1.weight"])
    assert all(torch.equal(p, before[name]) for name, p in nets.named_parameters() if name.startswith("encoder"))


def test_probabilities_are_constant_over_the_image(nets):
    found = FrozenImageNet().predict(nets.eval(), torch.randn(2, 1, 32, 40))
    assert found.shape == (2, 3, 32, 40) and (found == found[..., :1, :1]).all()
    torch.testing.assert_close(found.sum(1), torch.ones(2, 32, 40))
    assert FrozenImageNet().embed(nets, torch.randn(2, 1, 32, 32)).shape == (2, 512)


def test_it_does_not_see_volumes():
    with pytest.raises(MedcookError, match="not volumes"):
        FrozenImageNet().build(inputs=1, classes=2, dims=3)


@pytest.mark.mirror
def test_it_holds_the_published_weights(mirror):
    built = FrozenImageNet().build(inputs=1, classes=2, dims=2)
    torch.testing.assert_close(built["encoder"].conv1.weight.data, load_squeezenet().conv1.weight.data)
