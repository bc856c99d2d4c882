"""Two levels of SqueezeNet; weights are random here, so nothing is fetched."""

import torch

from medcook.few_shot.imagenet import DEEP, FINE, LAYERS, WIDTHS, imagenet_maps
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
