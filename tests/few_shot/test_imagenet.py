"""Two levels of SqueezeNet; weights are random here, so nothing is fetched."""

import torch

from medcook.few_shot import PrototypeNetwork
from medcook.few_shot.imagenet import DEEP, FINE, LAYERS, WIDTHS, imagenet_maps
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


def test_only_the_projection_learns(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr("medcook.few_shot.imagenet.load_squeezenet", lambda: SqueezeNet(features_only=True))
    method = PrototypeNetwork(encoder="imagenet", base=1.0)
    nets = method.build(1, 3, 2)
    images, labels = torch.randn(2, 1, 48, 48), torch.randint(0, 3, (2, 48, 48)).byte()
    maps = method.encode(nets["model"], images)
    assert maps.shape == (2, method.width, 12, 12)
    method.training_step(nets, Batch(images, labels), None, Moment(0, 10)).backward()
    learned = {name for name, p in nets["model"].named_parameters() if p.grad is not None}
    assert learned == {"features.out.weight", "features.out.bias", "head.weight", "head.bias"}
