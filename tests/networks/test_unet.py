"""The U-Net: shapes, size, a golden output, and skips that matter. MONAI's by name."""

import pytest
import torch

from medcook.errors import MedcookError
from medcook.networks import UNet, build_network, parameters

TINY = (4, 8, 8)
GOLDEN_OUTPUT = [-0.2411, 0.3079, 0.2791, 0.0669]
GOLDEN_SPREAD = 0.2202
GOLDEN_LOSSES = [1.5547, 1.2169, 1.0627]


def seeded(**settings) -> UNet:
    torch.manual_seed(0)
    return UNet(**settings)


def settled() -> UNet:
    """A tiny network whose normalisation has seen images, so that every level has a say."""
    net = seeded(channels=TINY)
    for _ in range(20):
        net(torch.randn(4, 1, 32, 32))
    return net.eval()


def ramp(*shape: int) -> torch.Tensor:
    return torch.linspace(-1, 1, torch.Size(shape).numel()).view(shape)


@pytest.mark.parametrize("size", [(32, 48), (16, 8, 24)])
def test_logits_have_the_size_of_the_image(size):
    net = UNet(inputs=2, classes=5, channels=TINY, dims=len(size))
    image = torch.randn(2, 2, *size)
    assert net(image).shape == (2, 5, *size)
    assert net.features(image).shape == (2, TINY[0], *size)


def test_golden_size():
    assert parameters(UNet()) == 1_226_068


def test_golden_output():
    """The same seed gives the same network: to 1e-3 on any machine."""
    output = seeded(channels=TINY).eval()(ramp(1, 1, 16, 16))
    assert output[0, :, 8, 8].tolist() == pytest.approx(GOLDEN_OUTPUT, abs=1e-3)
    assert output.std().item() == pytest.approx(GOLDEN_SPREAD, abs=1e-3)


def test_golden_training():
    """Three steps of plain descent end at the same loss, to 1e-3 on any machine."""
    net = seeded(channels=TINY)
    optimiser = torch.optim.SGD(net.parameters(), lr=0.5)
    losses = []
    for _ in range(3):
        losses.append(torch.nn.functional.cross_entropy(net(ramp(2, 1, 16, 16)), ramp(2, 16, 16).gt(0).long()))
        optimiser.zero_grad()
        losses[-1].backward()
        optimiser.step()
    assert [loss.item() for loss in losses] == pytest.approx(GOLDEN_LOSSES, abs=1e-3)


@pytest.mark.parametrize("level", [0, 1])
def test_every_skip_matters(level):
    net, image = settled(), ramp(1, 1, 16, 16)
    before = net(image)
    skip = TINY[level]

    def silence(module, inputs):
        joined = inputs[0].clone()
        joined[:, :skip] = 0
        return (joined,)

    net.up[level].register_forward_pre_hook(silence)
    assert (net(image) - before).abs().max() > 0.01


def test_the_depth_matters():
    """A change far away reaches a voxel through the pooled levels."""
    net, image = settled(), torch.zeros(1, 1, 32, 32)
    far = image.clone()
    far[..., 31] = 10
    assert (net(image) - net(far))[0, :, 16, 16].abs().max() > 1e-3


@pytest.mark.parametrize("name", ["unet", "monai-unet", "monai-basic"])
@pytest.mark.parametrize("dims", [2, 3])
def test_networks_by_name(name, dims):
    net = build_network(name, inputs=1, classes=3, channels=(2, 2, 4, 4, 4), dims=dims)
    assert net(torch.randn(2, 1, *[32] * dims)).shape == (2, 3, *[32] * dims)


def test_frozen_parameters_do_not_count():
    net = UNet(channels=TINY)
    everything, head = parameters(net), parameters(net.head)
    net.head.requires_grad_(False)
    assert parameters(net) == everything - head


def test_an_unknown_network_is_named():
    with pytest.raises(MedcookError, match="'resnet'.*unet, monai-unet, monai-basic"):
        build_network("resnet", inputs=1, classes=2, channels=(2, 4), dims=2)
    with pytest.raises(MedcookError, match="five channel counts"):
        build_network("monai-basic", inputs=1, classes=2, channels=(2, 4), dims=2)
