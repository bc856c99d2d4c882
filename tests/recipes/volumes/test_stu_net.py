"""STU-Net: the block against MONAI's, weights that fit any stride and any classes, and what is scaled at what cost."""

import pytest
import torch
import torch.nn.functional as F
from monai.networks.blocks import UnetResBlock
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from medcook.methods import Batch, Moment
from medcook.recipes.volumes.stu_net import LARGE, SMALL, Residual, Scalable, STUNet, Upsample, recipe, transfer

TINY = (2, 3, 4)


def net(inputs=1, classes=3, channels=TINY, depth=2, **settings) -> STUNet:
    return STUNet(inputs=inputs, classes=classes, channels=channels, depth=depth, **settings)


@pytest.mark.component("residual blocks")
@pytest.mark.parametrize(("outputs", "stride"), [(3, None), (5, (1, 1, 1)), (3, (2, 2, 2)), (4, (1, 2, 2))])
def test_a_block_is_that_of_monai_without_a_norm_on_the_shortcut(outputs, stride):
    norm = ("instance", {"affine": True})
    ours, theirs = Residual(3, outputs, stride), UnetResBlock(3, 3, outputs, 3, stride or 1, norm)
    shortcut = isinstance(ours.shortcut, nn.Conv3d)
    assert shortcut == theirs.downsample
    theirs.conv1.conv.weight, theirs.conv2.conv.weight = ours.first.weight, ours.second.weight
    if shortcut:
        theirs.conv3, theirs.norm3 = ours.shortcut, nn.Identity()
    for norm in ours.norms:
        nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
    theirs.norm1.load_state_dict(ours.norms[0].state_dict()), theirs.norm2.load_state_dict(ours.norms[1].state_dict())
    x = torch.randn(2, 3, 6, 8, 4)
    assert torch.allclose(ours(x), theirs(x), atol=1e-5)


@pytest.mark.component("residual blocks")
def test_what_the_convolutions_ignore_passes_on_the_shortcut():
    """With silent convolutions a stage without a change of grid is a leaky ReLU, however many blocks it has."""
    network, x = net(inputs=2, depth=4), torch.rand(1, 2, 8, 8, 8)
    for norm in (module for module in network.modules() if isinstance(module, nn.GroupNorm)):
        nn.init.zeros_(norm.weight)
    wanted = network.stem[0].shortcut(x)
    for _ in range(4):
        wanted = F.leaky_relu(wanted)
    assert torch.allclose(network.stem(x), wanted, atol=1e-6)


@pytest.mark.component("residual blocks")
def test_the_first_block_of_a_stage_halves_the_grid():
    network, x = net(depth=3), torch.randn(1, 2, 9, 8, 6)
    first, *others = network.down[0]
    assert first(x).shape == (1, 3, 5, 4, 3)
    assert all(block(first(x)).shape == (1, 3, 5, 4, 3) for block in others)
    assert not any("pool" in type(module).__name__.lower() for module in network.modules())


@pytest.mark.component("upsampling without strides in its weights")
def test_the_nearest_voxel_is_copied_and_mixed():
    up, x = Upsample(3, 2), torch.randn(1, 3, 2, 4, 3)
    copied = x.repeat_interleave(2, 3).repeat_interleave(3, 4)
    wanted = torch.einsum("oi,bidhw->bodhw", up.mix.weight[..., 0, 0, 0], copied) + up.mix.bias[:, None, None, None]
    assert torch.allclose(up(x, torch.Size((2, 8, 9))), wanted, atol=1e-6)
    assert up.mix.weight.shape == (2, 3, 1, 1, 1)


@pytest.mark.component("upsampling without strides in its weights")
def test_weights_fit_other_strides():
    """Those of a network for cubes also run on flat volumes, of which the slices are never merged."""
    cubes, flat = net(), net(strides=((1, 2, 2), (1, 2, 2)))
    flat.load_state_dict(cubes.state_dict())
    levels = []
    flat.down[-1].register_forward_hook(lambda _, __, output: levels.append(output.shape[2:]))
    assert flat(torch.randn(1, 1, 3, 16, 16)).shape == (1, 3, 3, 16, 16)
    assert levels == [(3, 4, 4)]


@pytest.mark.component("transfer of weights")
def test_all_but_the_head_is_transferred():
    source, target = net(classes=5), net(classes=3, strides=((2, 2, 2), (1, 2, 2)))
    head = target.head.weight.detach().clone()
    transfer(source, target)
    assert torch.equal(target.head.weight, head) and target.head.out_channels == 3
    known = source.state_dict()
    assert all(torch.equal(w, known[name]) for name, w in target.state_dict().items() if not name.startswith("head"))
    assert any(name.startswith("head") for name in known)


@pytest.mark.component("transfer of weights")
def test_a_head_of_equal_shape_stays_too():
    source, target = net(), net()
    head = target.head.weight.detach().clone()
    transfer(source, target)
    assert torch.equal(target.head.weight, head) and not torch.equal(head, source.head.weight)


@pytest.mark.component("transfer of weights")
def test_more_input_channels_repeat_the_first_convolutions():
    """Silence in the second channel gives the features of the source."""
    source, target = net().eval(), net(inputs=2).eval()
    transfer(source, target)
    image = torch.randn(1, 1, 8, 8, 8)
    assert torch.allclose(target.stem(torch.cat([image, 0 * image], dim=1)), source.stem(image), atol=1e-6)
    assert torch.allclose(target.stem(torch.cat([0 * image, image], dim=1)), source.stem(image), atol=1e-6)


def adds(arm: str) -> float:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        recipe.arms[arm].method.model(1, 3)(torch.randn(1, 1, 16, 24, 16))
    return counter.get_total_flops() / 2


def parameters(arm: str) -> int:
    return sum(p.numel() for p in recipe.arms[arm].method.model(1, 3).parameters())


def test_large_is_twice_as_wide_and_twice_as_deep():
    small, large = recipe.arms["small"].method, recipe.arms["large"].method
    assert large.channels == tuple(2 * c for c in small.channels) and large.depth == 2 * small.depth
    for method in (small, large):
        network = method.model(1, 3)
        stages = [network.stem, *network.down, *network.join]
        assert all(len(stage) == method.depth for stage in stages)
        assert [stage[-1].second.out_channels for stage in stages] == [*method.channels, *method.channels[-2::-1]]


def test_the_ablation_costs_as_much_and_is_not_deeper():
    wide = recipe.arms["wider alone"].method
    assert wide.depth == recipe.arms["small"].method.depth
    assert all(w / s == wide.channels[0] / SMALL[0] for w, s in zip(wide.channels, SMALL, strict=True))
    assert adds("wider alone") == pytest.approx(adds("large"), rel=0.03)
    assert parameters("wider alone") == pytest.approx(parameters("large"), rel=0.1)
    assert Scalable(channels=LARGE, depth=2) == recipe.arms["large"].method


@pytest.mark.parametrize("size", [(16, 16, 16), (8, 24, 16), (9, 11, 14), (8, 8, 8)])
def test_any_size_comes_back(size):
    assert net(channels=(2, 2, 3, 4))(torch.randn(2, 1, *size)).shape == (2, 3, *size)


@pytest.mark.parametrize("depth", [1, 3])
def test_every_parameter_is_trained(depth):
    method = Scalable(channels=TINY, depth=depth)
    nets = method.build(1, 3, 3)
    batch = Batch(torch.randn(2, 1, 12, 12, 12), torch.randint(0, 3, (2, 12, 12, 12)).byte())
    method.training_step(nets, batch, None, Moment(0, 10)).backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in nets["model"].parameters())
