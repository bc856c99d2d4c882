"""Two levels of SqueezeNet; weights are random here, so nothing is fetched."""

import pytest
import torch
import torch.nn.functional as F

from medcook.few_shot import PrototypeNetwork
from medcook.few_shot.imagenet import DEEP, FINE, LAYERS, WIDTH, WIDTHS, ImageNetFeatures, imagenet_maps
from medcook.methods import Batch, Moment
from medcook.networks.squeezenet import SqueezeNet


def test_the_levels_are_those_of_the_network():
    torch.manual_seed(0)
    network, images = SqueezeNet(features_only=True).eval(), torch.randn(2, 1, 64, 64)
    found, hooked = imagenet_maps(network, images), {}
    for name in (FINE, DEEP):
        getattr(network, name).register_forward_hook(lambda _, __, out, name=name: hooked.update({name: out}))
    network.features(58.0 * images.expand(-1, 3, -1, -1))
    assert LAYERS[-1] == DEEP
    for name, maps in found.items():
        assert torch.allclose(maps, hooked[name]) and maps.shape[1] == WIDTHS[name]
    assert found[FINE].shape[2:] == (14, 14) and found[DEEP].shape[2:] == (7, 7)
    assert not found[FINE].requires_grad


def test_training_begins_with_the_frozen_features(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr("medcook.few_shot.imagenet.load_squeezenet", lambda: SqueezeNet(features_only=True).eval())
    features, images = ImageNetFeatures(), torch.randn(2, 1, 48, 48)
    maps = features(images)
    assert maps.shape == (2, WIDTH, 12, 12)
    levels = [F.normalize(each, dim=1) for each in imagenet_maps(features.frozen, images).values()]
    wanted = torch.cat(
        [F.interpolate(each, size=(12, 12), mode="bilinear", align_corners=False) for each in levels], dim=1
    )
    assert torch.allclose(maps, wanted, atol=1e-6)


def test_only_the_change_learns(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr("medcook.few_shot.imagenet.load_squeezenet", lambda: SqueezeNet(features_only=True))
    method = PrototypeNetwork(encoder="imagenet", base=1.0)
    nets = method.build(1, 3, 2)
    images, labels = torch.randn(2, 1, 48, 48), torch.randint(0, 3, (2, 48, 48)).byte()
    assert method.encode(nets["model"], images).shape == (2, method.width, 12, 12)
    method.training_step(nets, Batch(images, labels), None, Moment(0, 10)).backward()
    learned = {name for name, p in nets["model"].named_parameters() if p.grad is not None}
    assert learned == {"features.change.0.weight", "features.change.1.weight", "head.weight", "head.bias"}
    assert nets["model"]["features"].change[1].weight.grad.abs().max() > 0


@pytest.mark.parametrize("encoder", ["own", "imagenet"])
def test_the_place_counts_as_much_as_is_said(encoder, monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr("medcook.few_shot.imagenet.load_squeezenet", lambda: SqueezeNet(features_only=True))
    plain, placed = (PrototypeNetwork(encoder=encoder, place=place) for place in (0.0, 0.3))
    net, images = placed.build(1, 3, 2)["model"].eval(), torch.randn(1, 1, 48, 64)
    assert placed.width == plain.width + 2
    maps = placed.encode(net, images)[0]
    assert torch.allclose(maps[:-2], F.normalize(plain.encode(net, images), dim=1)[0], atol=1e-6)
    assert torch.allclose(maps[-2], torch.linspace(-0.3, 0.3, 12)[:, None].expand(12, 16))
    assert torch.allclose(maps[-1], torch.linspace(-0.3, 0.3, 16).expand(12, 16))
