"""MK-UNet: kernels side by side, three kinds of attention, and how little all of it weighs."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from medcook.networks import UNet, parameters
from medcook.recipes.architectures.mk_unet import (
    ChannelAttention,
    GroupedGate,
    InvertedResidual,
    MKNet,
    MKUNet,
    MultiKernel,
    SpatialAttention,
)

SMALL = (4, 8, 8, 8, 8)


def scrambled(module: nn.Module) -> nn.Module:
    """With statistics and scales of batch normalisation that are not one and zero, ready to predict."""
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            for values in (part.running_var, part.weight.data):
                values.uniform_(0.5, 2)
            for values in (part.running_mean, part.bias.data):
                values.normal_(std=0.3)
    return module.eval()


def plain(x: torch.Tensor, path: nn.Sequential, groups: int = 1) -> torch.Tensor:
    """A convolution and its normalisation, written out."""
    conv, norm = path[0], path[1]
    x = F.conv2d(x, conv.weight, padding=conv.weight.shape[-1] // 2, groups=groups)
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    return (x - norm.running_mean[:, None, None]) * scale[:, None, None] + norm.bias[:, None, None]


@pytest.mark.component("multi-kernel depth-wise convolution")
def test_paths_are_depth_wise_and_added():
    block, x = scrambled(MultiKernel(4)), torch.randn(2, 4, 9, 9)
    assert [path[0].weight.shape for path in block.paths] == [(4, 1, side, side) for side in (1, 3, 5)]
    wanted = sum(plain(x, path, groups=4).clamp(0, 6) for path in block.paths)
    assert torch.allclose(block(x), wanted, atol=1e-5)


@pytest.mark.component("multi-kernel depth-wise convolution")
@pytest.mark.parametrize(("kernels", "reach"), [((1, 3, 5), 2), ((3,), 1), ((1,), 0)])
def test_the_largest_kernel_is_its_reach(kernels, reach):
    """A pixel of one channel is changed: that channel hears of it, as far as the largest kernel goes."""
    block, x = MultiKernel(3, kernels).eval(), torch.zeros(1, 3, 11, 11)
    with torch.no_grad():
        for path in block.paths:
            path[0].weight.fill_(1.0)
    other = x.clone()
    other[0, 1, 5, 5] = 1
    heard = (block(other) - block(x)).abs() > 0
    wanted = torch.zeros_like(heard)
    wanted[0, 1, 5 - reach : 6 + reach, 5 - reach : 6 + reach] = True
    assert torch.equal(heard, wanted)


@pytest.mark.component("multi-kernel depth-wise convolution")
@pytest.mark.parametrize("outputs", [4, 6])
def test_a_block_widens_narrows_and_adds_what_came_in(outputs):
    block, x = scrambled(InvertedResidual(4, outputs)), torch.randn(2, 4, 9, 9)
    wide = plain(x, block.widen).clamp(0, 6)
    assert wide.shape[1] == 8
    came = x if outputs == 4 else F.conv2d(x, block.shortcut.weight)
    assert torch.allclose(block(x), came + plain(block.kernels(wide), block.narrow), atol=1e-5)


@pytest.mark.component("channel attention")
def test_a_channel_is_weighed_as_a_whole():
    attention, x = ChannelAttention(8), torch.rand(2, 8, 5, 7) + 0.1
    weight = attention(x) / x
    assert torch.allclose(weight, weight[:, :, :1, :1].expand_as(weight), atol=1e-5)
    first, last = (attention.judge[layer].weight[:, :, 0, 0] for layer in (0, 2))
    heard = [F.relu(statistic @ first.T) @ last.T for statistic in (x.mean((2, 3)), x.flatten(2).max(2).values)]
    assert torch.allclose(weight[:, :, 0, 0], (heard[0] + heard[1]).sigmoid(), atol=1e-5)


@pytest.mark.component("spatial attention")
def test_a_pixel_is_weighed_in_all_channels_alike():
    attention, x = SpatialAttention(), torch.rand(2, 8, 9, 9) + 0.1
    weight = attention(x) / x
    assert torch.allclose(weight, weight[:, :1].expand_as(weight), atol=1e-5)
    statistics = torch.stack([x.mean(1), x.max(1).values], dim=1)
    assert torch.allclose(weight[:, :1], F.conv2d(statistics, attention.judge.weight, padding=3).sigmoid(), atol=1e-5)


@pytest.mark.component("grouped gated attention")
def test_a_gate_hears_decoder_and_skip():
    gate, decoder, skip = scrambled(GroupedGate(6)), torch.randn(2, 6, 8, 8), torch.randn(2, 6, 8, 8)
    both = F.relu(plain(decoder, gate.decoder, groups=3) + plain(skip, gate.skip, groups=3))
    assert torch.allclose(gate(decoder, skip), skip * plain(both, gate.judge).sigmoid(), atol=1e-5)
    assert gate.decoder[0].weight.shape == (3, 2, 3, 3)


@pytest.mark.component("grouped gated attention")
@pytest.mark.parametrize("gates", [True, False])
def test_gates_stand_on_the_skips(gates):
    """A gate that is shut leaves nothing of the encoder's finest stages but what came through the deepest one."""
    network = scrambled(MKUNet(inputs=1, classes=2, channels=SMALL, gates=gates))
    assert bool(network.gates) == gates and (not gates or len(network.gates) == 4)
    image, before = torch.randn(1, 1, 32, 32), None
    for bias in (0.0, -1e4):
        for gate in network.gates or []:
            gate.judge[1].bias.data.fill_(bias)
        found = network(image)
        assert before is None or torch.equal(found, before) != gates
        before = found


@pytest.mark.component("lightness")
def test_it_has_as_many_parameters_as_the_paper_says():
    """0.316 million for colour images and a mask; less than a third of the book's U-Net."""
    assert parameters(MKUNet(inputs=3, classes=1)) == pytest.approx(316_000, rel=0.01)
    assert 3 * parameters(MKNet().model(1, 4)) < parameters(UNet(inputs=1, classes=4))


@pytest.mark.parametrize("size", [(32, 32), (40, 36), (33, 47)])
def test_any_size_comes_back(size):
    network = MKUNet(inputs=1, classes=3, channels=SMALL)
    assert network(torch.randn(2, 1, *size)).shape == (2, 3, *size)


@pytest.mark.parametrize("changes", [{}, {"kernels": (3,)}, {"attention": False}, {"gates": False}])
def test_every_weight_is_used(changes):
    network = MKNet(channels=SMALL, **changes).model(1, 3)
    network(torch.randn(2, 1, 40, 40)).square().mean().backward()
    assert all(weight.grad is not None for weight in network.parameters())


def test_the_ablation_has_one_kernel_where_there_were_three():
    whole, single = (
        {name: weight.shape for name, weight in MKNet(kernels=kernels).model(1, 4).named_parameters()}
        for kernels in ((1, 3, 5), (3,))
    )
    paths = {name for name in whole if "kernels.paths." in name}
    assert {name: shape for name, shape in whole.items() if name not in paths} == {
        name: shape for name, shape in single.items() if name not in paths
    }
    depth_wise = [shape for name, shape in single.items() if name.endswith("kernels.paths.0.0.weight")]
    assert len(depth_wise) == 10 and {shape[2:] for shape in depth_wise} == {(3, 3)}
    assert not any("paths.1" in name for name in single)


def test_attentions_can_be_taken_away():
    names = {name for name, _ in MKNet(attention=False, gates=False).model(1, 4).named_parameters()}
    assert not any(name.startswith(("channel", "spatial", "gates")) for name in names)
