"""MSVM-UNet (Chen, Yu, Min and Wang, preprint 2024, arXiv 2408.13735): scans and convolutions of several scales.

A selective scan in four directions hears the whole map, but pixel by pixel: what is near, above and beside alike, it
hears badly, and structures have many sizes. In the blocks of the decoder the network of every token is therefore given
depthwise convolutions of several sizes, x + sum over k of DWConv_k(x), between its two linear layers. A map is made
larger by channels that become pixels, after a convolution that lets neighbours take part in it.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medcook.recipes.architectures._scan import SelectiveStateSpace
from medcook.recipes.architectures._settings import BASELINE, Architecture, scales
from medcook.recipes.architectures.mamba_survey import ORDERS, inverse
from medcook.recipes.recipe import Arm, Component, Recipe

KERNELS = (1, 3, 5)
"""Sides of the depthwise convolutions of a block of the decoder, in pixels."""


def convolved(conv: nn.Module, x: Tensor) -> Tensor:
    """A map with its channels last (B, H, W, C) through a convolution."""
    return conv(x.movedim(-1, 1)).movedim(1, -1)


def within(x: Tensor, size: torch.Size) -> Tensor:
    """The first rows and columns of a map (B, H, W, C): an odd side was rounded up on the way down."""
    return x[:, : size[0], : size[1]]


class FourWayScan(nn.Module):
    """A map (B, H, W, width) to the same: Linear(norm(sum over the four directions of SSM(silu(DWConv(Linear x))))).

    Each direction, by rows and by columns, there and back, scans all channels with a state space of its own.
    """

    def __init__(self, width: int, states: int = 1):
        super().__init__()
        self.enter, self.leave = (nn.Linear(width, width, bias=False) for _ in range(2))
        self.near = nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False)
        self.scans = nn.ModuleList(SelectiveStateSpace(width, states) for _ in ORDERS["cross"])
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        size = x.shape[1:3]
        tokens = F.silu(convolved(self.near, self.enter(x))).flatten(1, 2)
        heard = 0
        for order, scan in zip(ORDERS["cross"], self.scans, strict=True):
            way = order(*size).to(x.device)
            heard = heard + scan(tokens[:, way])[:, inverse(way)]
        return self.leave(self.norm(heard)).unflatten(1, size)


class MultiScale(nn.Module):
    """A map (B, H, W, width) to the same: x + sum over k of DWConv_k(x), k x k pixels.

    Convolutions are linear, so that they are taken as one, whose kernel is the sum of theirs around the same centre.
    """

    def __init__(self, width: int, kernels: tuple[int, ...] = KERNELS):
        super().__init__()
        self.convolutions = nn.ModuleList(nn.Conv2d(width, width, k, groups=width, bias=False) for k in kernels)

    def kernel(self) -> Tensor:
        """(width, 1, k, k), k the largest."""
        weights = [conv.weight for conv in self.convolutions]
        side = max(weight.shape[-1] for weight in weights)
        return sum(F.pad(weight, [(side - weight.shape[-1]) // 2] * 4) for weight in weights)

    def forward(self, x: Tensor) -> Tensor:
        kernel = self.kernel()
        near = F.conv2d(x.movedim(-1, 1), kernel, padding=kernel.shape[-1] // 2, groups=len(kernel))
        return x + near.movedim(1, -1)


class Block(nn.Module):
    """The visual state-space block, a map (B, H, W, width) to the same: a scan, then a small network, both residual.

    kernels  of the multi-scale convolution inside the small network; None: it sees each token alone, as in VMamba
    grown    how many times wider the small network is inside
    """

    def __init__(self, width: int, kernels: tuple[int, ...] | None = None, *, grown: int = 4):
        super().__init__()
        self.norm, self.norm_grown = nn.LayerNorm(width), nn.LayerNorm(width)
        self.scan = FourWayScan(width)
        self.grow, self.shrink = nn.Linear(width, grown * width), nn.Linear(grown * width, width)
        self.scales = MultiScale(grown * width, kernels) if kernels else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.scan(self.norm(x))
        return x + self.shrink(self.scales(F.gelu(self.grow(self.norm_grown(x)))))


class Expand(nn.Module):
    """The large-kernel patch expanding: a map (B, H, W, inputs) to (B, times * H, times * W, outputs).

    relu(norm(Linear x)) has times^2 as many channels as will be left; a depthwise 3 x 3 convolution makes each of them
    see its neighbours, and groups of times^2 channels become squares of pixels.
    near  False: without the convolution, the patch expanding of other networks
    """

    def __init__(self, inputs: int, outputs: int, *, times: int = 2, near: bool = True):
        super().__init__()
        grown, self.times = times**2 * outputs, times
        self.grow, self.norm_grown = nn.Conv2d(inputs, grown, 1), nn.BatchNorm2d(grown)
        self.near = nn.Conv2d(grown, grown, 3, padding=1, groups=grown) if near else nn.Identity()
        self.norm = nn.LayerNorm(outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = self.near(F.relu(self.norm_grown(self.grow(x.movedim(-1, 1)))))
        return self.norm(F.pixel_shuffle(x, self.times).movedim(1, -1))


class Halve(nn.Module):
    """A map (B, H, W, inputs) to (B, ceil(H / 2), ceil(W / 2), outputs): a 3 x 3 convolution and a norm."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(inputs, outputs, 3, stride=2, padding=1), nn.LayerNorm(outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(convolved(self.conv, x))


class MSVMUNet(nn.Module):
    """(B, inputs, H, W) to logits (B, classes, H, W); tokens of 4 x 4 pixels, at every deeper level of twice the side.

    widths  of the levels, finest first; depth  blocks of each level, on the way down and on the way up
    """

    def __init__(
        self,
        *,
        inputs: int,
        classes: int,
        widths: tuple[int, ...],
        depth: int,
        kernels: tuple[int, ...] = KERNELS,
        near: bool = True,
    ):
        super().__init__()
        blocks = lambda width, kernels=None: nn.Sequential(*(Block(width, kernels) for _ in range(depth)))  # noqa: E731
        pairs = list(zip(widths, widths[1:], strict=False))
        stem = nn.Sequential(Halve(inputs, widths[0] // 2), nn.GELU(), Halve(widths[0] // 2, widths[0]))
        self.halve = nn.ModuleList([stem, *(Halve(skip, deep) for skip, deep in pairs)])
        self.down = nn.ModuleList(blocks(width) for width in widths)
        self.expand = nn.ModuleList(Expand(deep, skip, near=near) for skip, deep in pairs)
        self.join = nn.ModuleList(nn.Linear(2 * skip, skip) for skip, _ in pairs)
        self.up = nn.ModuleList(blocks(skip, kernels) for skip, _ in pairs)
        self.last = Expand(widths[0], widths[0], times=4, near=near)
        self.head = nn.Linear(widths[0], classes)

    def forward(self, image: Tensor) -> Tensor:
        x, skips = image.movedim(1, -1), []
        for halve, blocks in zip(self.halve, self.down, strict=True):
            x = blocks(halve(x))
            skips.append(x)
        skips.pop()
        steps = zip(reversed(self.expand), reversed(self.join), reversed(self.up), reversed(skips), strict=True)
        for expand, join, blocks, skip in steps:
            x = blocks(join(torch.cat([within(expand(x), skip.shape[1:3]), skip], dim=-1)))
        return self.head(within(self.last(x), image.shape[2:])).movedim(-1, 1)


@dataclass
class Msvm(Architecture):
    """A U-Net of visual state-space blocks, with convolutions of several scales on the way up.

    widths   of the levels, finest first (`channels` has no meaning here); depth  blocks of each level
    kernels  sides of the convolutions; (3,) is one scale, all else equal
    near     False: patch expanding without its convolution
    """

    widths: tuple[int, ...] = (32, 64, 128)
    depth: int = 1
    kernels: tuple[int, ...] = KERNELS
    near: bool = True

    def model(self, inputs: int, classes: int) -> nn.Module:
        return MSVMUNet(
            inputs=inputs,
            classes=classes,
            widths=self.widths,
            depth=self.depth,
            kernels=self.kernels,
            near=self.near,
        )


recipe = Recipe(
    paper="msvm-unet",
    title="MSVM-UNet: scans and convolutions of several scales",
    claim="A U-Net of four-way selective scans, with convolutions of several scales and large-kernel patch expanding "
    "on its way up, reaches a higher Dice on hearts than a U-Net.",
    arms={
        "unet": Arm(BASELINE),
        "msvm-unet": Arm(Msvm()),
        "one scale": Arm(Msvm(kernels=(3,))),
        "without large kernel": Arm(Msvm(near=False)),
    },
    compare=("msvm-unet", "unet"),
    ablation=("msvm-unet", "one scale"),
    replicate="fold",
    scales=scales("unet", "msvm-unet", "one scale"),
    published={"Synapse, Dice": 0.8500, "ACDC, Dice": 0.9258},
    source="the tables in the README of the official code, github.com/gndlwch2w/msvm-unet, which the layers follow",
    components=(
        Component(
            "multi-scale convolutions",
            "implemented",
            "1 x 1, 3 x 3 and 5 x 5, depthwise, between the two linear layers of the blocks of the decoder; taken as "
            "one convolution with the sum of the kernels, which is the same",
        ),
        Component(
            "scans in four directions",
            "implemented",
            "rows and columns, there and back, one state for each channel and no gate, as in the official "
            "configuration; in plain PyTorch",
        ),
        Component(
            "large-kernel patch expanding",
            "implemented",
            "sides become twice as long between the levels, four times at the end; the convolution is depthwise and "
            "3 x 3, as in the official code",
        ),
        Component(
            "VMamba encoder",
            "simplified",
            "from scratch, the paper's is trained on ImageNet; three levels of one block, there four of 2, 2, 8 and 2, "
            "and widths from 32 to 128, there 96 to 768; tokens of 4 x 4 pixels as there; the deepest grid is 8 x 8 "
            "for a slice of 128 x 128, there 7 x 7 for 224 x 224; no dropped paths",
        ),
        Component("Synapse", "absent", "hearts alone; the paper has abdominal organs in CT as well"),
    ),
)
