"""Cross-D Conv: where a phase moves a kernel, what a slice trains, and that weights are the same in 2D and in 3D."""

import math
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from medcook.losses import find_loss
from medcook.methods import Batch, Moment
from medcook.networks import UNet
from medcook.recipes.volumes.cross_d_conv import (
    AcsConv,
    CrossConv,
    CrossD,
    CrossUNet,
    Rotation,
    in_three_planes,
    rotation_shift,
    shifted,
)

SMALL = (4, 6, 8, 8)
FLAT, SOLID = Moment(0, 10), Moment(9, 10)


def net(kernels: str = "shifted", **settings) -> CrossUNet:
    torch.manual_seed(0)
    return CrossUNet(inputs=1, classes=3, **{"channels": SMALL, "kernels": kernels, **settings})


def some(side: int = 16) -> Batch:
    return Batch(torch.randn(2, 1, 8, side, side), torch.randint(0, 3, (2, 8, side, side)).byte())


@pytest.mark.component("learned phase shift in the Fourier domain")
def test_whole_shifts_roll_and_others_interpolate():
    """Between the voxels: the trigonometric polynomial through them, evaluated voxel by voxel."""
    kernels, shifts = torch.randn(2, 3, 3, 3), torch.tensor([[1.0, 0, -1], [0.3, -0.8, 1.2]])
    rolled, between = shifted(kernels, shifts)
    assert torch.allclose(rolled, kernels.roll((1, 0, -1), (1, 2, 3)), atol=1e-5)
    weigh = lambda far: (1 + 2 * math.cos(2 * math.pi * far / 3)) / 3  # noqa: E731
    for to in product(range(3), repeat=3):
        wanted = sum(
            kernels[:, *of] * math.prod(weigh(a - b - s) for a, b, s in zip(to, of, shifts[1].tolist(), strict=True))
            for of in product(range(3), repeat=3)
        )
        assert torch.allclose(between[:, *to], wanted, atol=1e-5)


@pytest.mark.component("learned phase shift in the Fourier domain")
def test_the_shift_is_that_of_rotated_frequencies():
    """The paper's phases, of R = I + angle K, but for its constant shift by one voxel."""
    axis, angle = F.normalize(torch.randn(4, 3), dim=1), torch.rand(4, 1) - 0.5
    kernels, frequencies = torch.randn(2, 5, 5, 5), torch.fft.fftfreq(5)
    grid = torch.stack(torch.meshgrid(frequencies, frequencies, frequencies, indexing="ij"), dim=-1)
    for n, ((x, y, z), theta) in enumerate(zip(axis, angle, strict=True)):
        turn = torch.eye(3) + theta * torch.tensor([[0, -z, y], [z, 0, -x], [-y, x, 0]])
        phases = torch.exp(-2j * math.pi * (grid @ turn.T).sum(-1))
        moved = torch.fft.ifftn(torch.fft.fftn(kernels, dim=(1, 2, 3)) * phases, dim=(1, 2, 3)).real
        found = shifted(kernels, rotation_shift(axis, angle))[n]
        assert torch.allclose(found, moved.roll((-1, -1, -1), (1, 2, 3)), atol=1e-5)


@pytest.mark.component("learned phase shift in the Fourier domain")
def test_a_rotation_is_predicted_from_the_strongest_pixels():
    rotation, x = Rotation(3).eval(), 5 * torch.randn(2, 3, 6, 7)
    axis, angle = rotation(x)
    maps = rotation.maps(x.flatten(2))
    weights = maps.exp() / maps.exp().sum(-1, keepdim=True)
    found = (maps * weights).sum(-1)
    assert torch.allclose(axis, found[:, :3] / found[:, :3].norm(dim=1, keepdim=True), atol=1e-5)
    assert torch.allclose(angle, found[:, 3:].tanh() * math.pi / 4, atol=1e-5)
    assert not torch.allclose(axis[0], axis[1]) and not torch.allclose(angle[0], angle[1])


@pytest.mark.component("learned phase shift in the Fourier domain")
def test_every_slice_is_convolved_with_the_middle_plane_of_its_own_kernels():
    convolution, slices = CrossConv(3, 5, 3).eval(), 3 * torch.randn(4, 3, 6, 7)
    found = convolution(slices)
    kernels = shifted(convolution.weight.flatten(0, 1), rotation_shift(*convolution.rotation(slices)))
    for one, kernel, output in zip(slices, kernels.unflatten(1, (5, 3)), found, strict=True):
        assert torch.allclose(output, F.conv2d(one[None], kernel[:, :, 1], padding=1)[0], atol=1e-5)


@pytest.mark.component("learned phase shift in the Fourier domain")
@pytest.mark.parametrize("phases", [True, False])
def test_slices_train_all_planes_only_with_phases(phases):
    convolution = CrossConv(3, 4, 3, phases=phases)
    convolution(torch.randn(2, 3, 6, 6)).square().sum().backward()
    trained = convolution.weight.grad.abs().sum((0, 1, 3, 4)) > 0
    assert trained.tolist() == [phases, True, phases]


@pytest.mark.component("weights move between 2D and 3D")
def test_in_a_volume_it_is_the_plain_network():
    network, plain = net(), UNet(inputs=1, classes=3, channels=SMALL, dims=3)
    network(torch.randn(3, 1, 16, 16))  # moves the statistics of the normalisation too
    weights = network.state_dict()
    assert set(plain.state_dict()) == {name for name in weights if "rotation" not in name}
    plain.load_state_dict(weights, strict=False)
    volume = torch.randn(1, 1, 9, 16, 16)
    assert torch.equal(plain.eval()(volume), network.eval()(volume))


@pytest.mark.component("weights move between 2D and 3D")
def test_a_two_dimensional_network_takes_the_middle_planes():
    network, plain = net("fixed"), UNet(inputs=1, classes=3, channels=SMALL, dims=2)
    network(torch.randn(1, 1, 8, 16, 16))
    weights = {name: w[:, :, w.shape[2] // 2] if w.dim() == 5 else w for name, w in network.state_dict().items()}
    plain.load_state_dict(weights)
    slices = torch.randn(3, 1, 16, 20)
    assert torch.allclose(plain.eval()(slices), network.eval()(slices), atol=1e-6)


@pytest.mark.component("weights move between 2D and 3D")
@pytest.mark.parametrize("kernels", ["shifted", "fixed", "acs"])
def test_there_and_back_nothing_is_lost(kernels):
    """What a step on slices has learnt is used in volumes, and a look at volumes changes nothing on slices."""
    network, slices, volume = net(kernels).eval(), torch.randn(3, 1, 16, 16), torch.randn(1, 1, 8, 16, 16)
    before = network(slices), network(volume)
    again = net(kernels).eval()
    again.load_state_dict(network.state_dict())
    assert torch.equal(again(volume), before[1]) and torch.equal(again(slices), before[0])
    network(slices).square().mean().backward()
    torch.optim.SGD(network.parameters(), lr=0.1).step()
    assert not torch.allclose(network(volume), before[1], atol=1e-4)


@pytest.mark.component("comparison with ACS convolutions")
def test_a_third_of_the_outputs_looks_along_each_axis():
    convolution, volume = AcsConv(2, 7, 3, bias=True), torch.randn(1, 2, 5, 6, 7)
    found = convolution(volume)
    for axis, outputs in zip((2, 3, 4), torch.arange(7).chunk(3), strict=True):
        for place, one in enumerate(volume.unbind(axis)):
            wanted = F.conv2d(one, convolution.weight[outputs, :, 0], convolution.bias[outputs], padding=1)
            assert torch.allclose(found[:, outputs].select(axis, place), wanted, atol=1e-5)
    slices = torch.randn(3, 2, 6, 7)
    assert torch.allclose(
        convolution(slices), F.conv2d(slices, convolution.weight[:, :, 0], convolution.bias, padding=1)
    )
    assert in_three_planes(torch.randn(4, 2, 1, 1)).shape == (4, 2, 1, 1, 1)


@pytest.mark.parametrize("now", [FLAT, SOLID])
def test_the_first_half_of_the_steps_is_on_slices(now):
    method, batch = CrossD(channels=SMALL), some()
    nets = method.build(1, 3, 3)
    images, labels = batch.images, batch.labels
    if now is FLAT:
        images = torch.stack([image[:, k] for image in images for k in range(8)])
        labels = torch.stack([label[k] for label in labels for k in range(8)])
    wanted = find_loss("both")(nets["model"](images), labels)
    assert torch.allclose(method.training_step(nets, batch, None, now), wanted, atol=1e-5)
    seen = []
    nets["model"].register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].dim()))
    for step in range(6):
        method.training_step(nets, batch, None, Moment(step, 6))
    assert seen == [4, 4, 4, 5, 5, 5]


@pytest.mark.parametrize("kernels", ["shifted", "fixed", "acs"])
@pytest.mark.parametrize("size", [(16, 16, 16), (8, 64, 64), (9, 11, 13), (40, 56)])
def test_any_size_comes_back(kernels, size):
    assert net(kernels)(torch.randn(2, 1, *size)).shape == (2, 3, *size)


def test_the_ablation_has_no_phases_and_is_otherwise_the_same():
    full, bare = (CrossD(channels=SMALL, kernels=kernels).model(1, 3) for kernels in ("shifted", "fixed"))
    weights = {name: weight for name, weight in full.state_dict().items() if "rotation" not in name}
    bare.load_state_dict(weights)
    slices, volume = torch.randn(3, 1, 16, 16), torch.randn(1, 1, 8, 16, 16)
    full.eval(), bare.eval()
    assert torch.equal(full(volume), bare(volume))
    assert not torch.allclose(full(slices), bare(slices), atol=1e-4)
    for rotation in (module for module in full.modules() if isinstance(module, Rotation)):
        nn.init.zeros_(rotation.maps[-1].weight), nn.init.zeros_(rotation.maps[-1].bias)
    assert torch.allclose(full(slices), bare(slices), atol=1e-5)


def test_it_also_works_in_bfloat16():
    network = net().eval()
    for image in (torch.randn(2, 1, 16, 16), torch.randn(1, 1, 16, 16, 16)):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rough = network(image)
        assert (rough.float() - network(image)).abs().mean() < 0.02


@pytest.mark.parametrize("kernels", ["shifted", "fixed", "acs"])
@pytest.mark.parametrize("now", [FLAT, SOLID])
def test_every_parameter_is_trained_on_slices_and_all_but_the_rotations_on_volumes(kernels, now):
    method = CrossD(channels=SMALL, kernels=kernels)
    nets = method.build(1, 3, 3)
    method.training_step(nets, some(), None, now).backward()
    idle = {name for name, p in nets["model"].named_parameters() if p.grad is None}
    rotations = {name for name, _ in nets["model"].named_parameters() if "rotation" in name}
    assert idle == (set() if now is FLAT else rotations) and bool(rotations) == (kernels == "shifted")
