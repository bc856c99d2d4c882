"""MK-UNet: depth-wise convolutions with several kernels (Rahman and Marculescu, ICCV workshops 2025; arXiv 2509.18493).

A depth-wise convolution costs one weight for each channel and tap, so a block can afford kernels of 1, 3 and 5 pixels
side by side; 1 x 1 convolutions widen the channels before them and narrow them afterwards. Channel, spatial and grouped
gated attention choose what the decoder keeps. The whole network has about 0.3 million parameters.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medcook.recipes.architectures._settings import BASELINE, Architecture, scales
from medcook.recipes.recipe import Arm, Component, Recipe

PAPER = (16, 32, 64, 96, 160)
CHANNELS = (8, 16, 32, 48, 80)
"""Half the paper's widths, as the baseline has half the book's."""
KERNELS = (1, 3, 5)
COLOURS = 3
"""A grey image is repeated to as many channels; otherwise the first block would have two channels to work with."""


def normalised(inputs: int, outputs: int, kernel: int = 1, *after: nn.Module, groups: int = 1) -> nn.Sequential:
    """A convolution that keeps the size, batch normalisation, and what comes after."""
    conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), *after)


class MultiKernel(nn.Module):
    """(B, C, H, W) to the same shape: a depth-wise convolution for each kernel, side by side, and their sum."""

    def __init__(self, channels: int, kernels: tuple[int, ...] = KERNELS):
        super().__init__()
        self.paths = nn.ModuleList(
            normalised(channels, channels, kernel, nn.ReLU6(), groups=channels) for kernel in kernels
        )

    def forward(self, x: Tensor) -> Tensor:
        return sum(path(x) for path in self.paths)


class InvertedResidual(nn.Module):
    """(B, inputs, H, W) to (B, outputs, H, W): widen, convolve depth by depth, narrow, and add what came in."""

    def __init__(self, inputs: int, outputs: int, kernels: tuple[int, ...] = KERNELS, expansion: int = 2):
        super().__init__()
        wide = expansion * inputs
        self.widen = normalised(inputs, wide, 1, nn.ReLU6())
        self.kernels = MultiKernel(wide, kernels)
        self.narrow = normalised(wide, outputs)
        self.shortcut = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.shortcut(x) + self.narrow(self.kernels(self.widen(x)))


class ChannelAttention(nn.Module):
    """Each channel of (B, C, H, W) weighed by what a small network makes of its mean and its maximum."""

    def __init__(self, channels: int):
        super().__init__()
        few = max(channels // 16, 4)
        self.judge = nn.Sequential(
            nn.Conv2d(channels, few, 1, bias=False), nn.ReLU(), nn.Conv2d(few, channels, 1, bias=False)
        )

    def forward(self, x: Tensor) -> Tensor:
        return x * (self.judge(x.mean((2, 3), keepdim=True)) + self.judge(x.amax((2, 3), keepdim=True))).sigmoid()


class SpatialAttention(nn.Module):
    """Each pixel of (B, C, H, W) weighed by the mean and the maximum of its channels, and its neighbours'."""

    def __init__(self, kernel: int = 7):
        super().__init__()
        self.judge = nn.Conv2d(2, 1, kernel, padding=kernel // 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.judge(torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], dim=1)).sigmoid()


class GroupedGate(nn.Module):
    """A skip (B, C, H, W), each pixel weighed by what it and the decoder (B, C, H, W) say: attention gates in groups.

    Every group takes two channels of each side to one, so that a gate costs 9 C weights and not 9 C * C / 2.
    """

    def __init__(self, channels: int):
        super().__init__()
        groups = channels // 2
        self.decoder, self.skip = (normalised(channels, groups, 3, groups=groups) for _ in range(2))
        self.judge = normalised(groups, 1, 1, nn.Sigmoid())

    def forward(self, decoder: Tensor, skip: Tensor) -> Tensor:
        return skip * self.judge(F.relu(self.decoder(decoder) + self.skip(skip)))


class MKUNet(nn.Module):
    """Five stages down, five up: (B, inputs, H, W) to logits (B, classes, H, W). Every side has at least 32 pixels.

    attention  False: no channel and spatial attention; `gates` False: skips are added as they are
    """

    def __init__(
        self,
        *,
        inputs: int,
        classes: int,
        channels: tuple[int, ...] = PAPER,
        kernels: tuple[int, ...] = KERNELS,
        attention: bool = True,
        gates: bool = True,
    ):
        super().__init__()
        self.copies = COLOURS if inputs == 1 else 1
        sizes, deep = (inputs * self.copies, *channels), channels[::-1]
        self.down = nn.ModuleList(InvertedResidual(i, o, kernels) for i, o in zip(sizes, channels, strict=False))
        self.up = nn.ModuleList(
            InvertedResidual(i, o, kernels) for i, o in zip(deep, (*deep[1:], channels[0]), strict=True)
        )
        self.channel = nn.ModuleList(ChannelAttention(each) if attention else nn.Identity() for each in deep)
        self.spatial = SpatialAttention() if attention else nn.Identity()
        self.gates = nn.ModuleList(GroupedGate(each) for each in deep[1:]) if gates else None
        self.head = nn.Conv2d(channels[0], classes, 1)

    def forward(self, image: Tensor) -> Tensor:
        x, sizes, skips = image.repeat(1, self.copies, 1, 1), [], []
        for block in self.down:
            sizes.append(x.shape[2:])
            x = F.max_pool2d(block(x), 2)
            skips.append(x)
        x = skips.pop()
        for number, (attend, block) in enumerate(zip(self.channel, self.up, strict=True)):
            x = block(self.spatial(attend(x)))
            x = F.relu(F.interpolate(x, size=sizes.pop(), mode="bilinear", align_corners=False))
            if skips:
                skip = skips.pop()
                x = x + (self.gates[number](x, skip) if self.gates else skip)
        return self.head(x)


@dataclass
class MKNet(Architecture):
    """MK-UNet.

    kernels    (3,): a single kernel; (3, 3, 3): as many as in the paper, of one size
    attention  False: without channel and spatial attention; `gates` False: without gates on the skips
    """

    channels: tuple[int, ...] = CHANNELS
    kernels: tuple[int, ...] = KERNELS
    attention: bool = True
    gates: bool = True

    def model(self, inputs: int, classes: int) -> nn.Module:
        switches = {"kernels": self.kernels, "attention": self.attention, "gates": self.gates}
        return MKUNet(inputs=inputs, classes=classes, channels=self.channels, **switches)


recipe = Recipe(
    paper="mk-unet",
    title="MK-UNet: several kernels, few parameters",
    claim="Multi-kernel depth-wise blocks segment hearts as well as a U-Net, to 0.01 Dice, with fewer parameters.",
    arms={
        "unet": Arm(BASELINE),
        "mk-unet": Arm(MKNet()),
        "single kernel": Arm(MKNet(kernels=(3,))),
        "three of a size": Arm(MKNet(kernels=(3, 3, 3))),
        "without attention": Arm(MKNet(attention=False)),
        "without gates": Arm(MKNet(gates=False)),
    },
    compare=("mk-unet", "unet"),
    ablation=("mk-unet", "single kernel"),
    replicate="fold",
    expect="cheaper-at-equal-quality",
    margin=0.01,
    cost="parameters",
    scales=scales("unet", "mk-unet", "single kernel"),
    published={"parameters, millions": 0.316, "GFLOPs": 0.314, "Dice above UNeXt, at most": 0.067},
    source="the abstract; reductions, kernels and groups of the attentions follow the official code, "
    "github.com/SLDGroup/MK-UNet",
    components=(
        Component(
            "multi-kernel depth-wise convolution",
            "implemented",
            "kernels of 1, 3 and 5 pixels in an inverted residual block that doubles the channels; without the channel "
            "shuffle after them: a dense 1 x 1 convolution follows, to which the order of channels is all one",
        ),
        Component("channel attention", "implemented", "before every block of the decoder"),
        Component("spatial attention", "implemented", "7 x 7, one for all stages as in the official code"),
        Component(
            "grouped gated attention",
            "implemented",
            "3 x 3 convolutions, a group for every two channels; on four skips",
        ),
        Component(
            "lightness",
            "implemented",
            "half of the paper's widths, as of the U-Net's; a grey slice is repeated to three channels; a single head",
        ),
        Component("six binary benchmarks", "absent", "tested on the four classes of hearts alone, against the U-Net"),
    ),
)
