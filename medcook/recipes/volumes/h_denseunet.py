"""H-DenseUNet (Li, Chen, Qi, Dou, Fu and Heng, IEEE Transactions on Medical Imaging 37, 2018; arXiv 1709.07330).

A 2D network has room for rich features within a slice, a 3D one sees across slices and has not. Here the 2D network
goes first, and the 3D network reads the volume together with what the 2D one makes of it (auto-context), so that it
need not find everything anew. Features of both are added, and a last layer decides; all of it learns together:

    X2 = f2(F(I)),   y2 = c2(X2)             F: every slice with its two neighbours as channels
    Z = f3(I, softmax y2) + X2               y2 and X2 as volumes again
    y = c(h(Z))                              h: the hybrid feature fusion layer
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medcook.recipes.architectures._settings import DeeplySupervised
from medcook.recipes.recipe import Arm, Component, Recipe
from medcook.recipes.volumes._settings import BASELINE, VolumeNetwork, scales
from medcook.recipes.volumes._slices import FLAT, neighbours

BOTTLENECK = 4
"""A dense layer's 1 x 1 convolution has so many times the channels that the layer adds."""
COMPRESSION = 0.5
"""The share of channels that is left between two dense blocks."""
STACK = 3
"""Slices that the 2D network sees at once."""
CUBE = (3, 3, 3)


def conv(inputs: int, outputs: int, kernel: tuple[int, int, int]) -> nn.Conv3d:
    """A convolution that keeps depth, height and width."""
    return nn.Conv3d(inputs, outputs, kernel, padding=tuple(side // 2 for side in kernel), bias=False)


def convolved(inputs: int, outputs: int, kernel: tuple[int, int, int]) -> nn.Sequential:
    """Convolution, batch normalisation and ReLU."""
    return nn.Sequential(conv(inputs, outputs, kernel), nn.BatchNorm3d(outputs), nn.ReLU(inplace=True))


def activated(inputs: int, outputs: int, kernel: tuple[int, int, int]) -> nn.Sequential:
    """The same in the order of a DenseNet: batch normalisation, ReLU, convolution."""
    return nn.Sequential(nn.BatchNorm3d(inputs), nn.ReLU(inplace=True), conv(inputs, outputs, kernel))


class DenseBlock(nn.Module):
    """(B, inputs, ...) to (B, inputs + layers * growth, ...): every layer sees the outputs of all before it."""

    def __init__(self, inputs: int, growth: int, layers: int, kernel: tuple[int, int, int]):
        super().__init__()
        middle = BOTTLENECK * growth
        self.layers = nn.ModuleList(
            nn.Sequential(activated(inputs + number * growth, middle, (1, 1, 1)), activated(middle, growth, kernel))
            for number in range(layers)
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.cat([x, layer(x)], dim=1)
        return x


class DenseUNet(nn.Module):
    """A DenseNet on the way down, sums with its levels on the way up: (B, inputs, D, H, W) to (B, stem, D, H, W).

    layers  of each dense block, which are at a half, a quarter, ... of the resolution
    flat    every slice on its own: kernels 1 x 3 x 3, and pooling within the slice
    """

    def __init__(self, *, inputs: int, stem: int, growth: int, layers: tuple[int, ...], flat: bool):
        super().__init__()
        kernel, self.step = (FLAT, (1, 2, 2)) if flat else (CUBE, (2, 2, 2))
        self.stem = convolved(inputs, stem, kernel)
        self.blocks, self.transitions, widths = nn.ModuleList(), nn.ModuleList([nn.Identity()]), [stem]
        for count in layers:
            width = widths[-1]
            if self.blocks:
                self.transitions.append(activated(width, width := int(COMPRESSION * width), (1, 1, 1)))
            self.blocks.append(DenseBlock(width, growth, count, kernel))
            widths.append(width + count * growth)
        self.last = nn.Sequential(nn.BatchNorm3d(widths[-1]), nn.ReLU(inplace=True))
        pairs = list(zip(widths, widths[1:], strict=False))
        self.lines = nn.ModuleList(nn.Conv3d(fine, deep, 1) for fine, deep in pairs)
        self.up = nn.ModuleList(convolved(deep, fine, kernel) for fine, deep in pairs)

    def forward(self, volume: Tensor) -> Tensor:
        levels = [self.stem(volume)]
        for block, transition in zip(self.blocks, self.transitions, strict=True):
            levels.append(block(F.avg_pool3d(transition(levels[-1]), self.step)))
        x = self.last(levels.pop())
        for line, up in zip(reversed(self.lines), reversed(self.up), strict=True):
            passed = line(levels.pop())
            x = up(passed + F.interpolate(x, passed.shape[2:], mode="trilinear", align_corners=False))
        return x


class HDenseUNet(nn.Module):
    """(B, inputs, D, H, W) to logits (B, classes, D, H, W).

    parts    the 2D network and its scores, the 3D network and the fusion layer on its features, or the hybrid of both
    context  False: the 3D network sees the volume alone, though features are added
    """

    def __init__(
        self,
        *,
        inputs: int,
        classes: int,
        stem: int = 8,
        growth: int = 8,
        layers: tuple[int, ...] = (2, 3, 4),
        parts: Literal["2d", "3d", "both"] = "both",
        context: bool = True,
    ):
        super().__init__()
        self.parts, self.context = parts, context
        sizes = dict(stem=stem, growth=growth, layers=layers)
        if parts != "3d":
            self.intra = DenseUNet(inputs=STACK * inputs, flat=True, **sizes)
            self.score = nn.Conv3d(stem, classes, 1)
        if parts != "2d":
            more = classes if context and parts == "both" else 0
            self.inter = DenseUNet(inputs=inputs + more, flat=False, **sizes)
            self.fusion = convolved(stem, stem, CUBE)
            self.head = nn.Conv3d(stem, classes, 1)

    def outputs(self, volume: Tensor) -> list[Tensor]:
        """The logits that predict and, of the hybrid, the scores of its 2D network."""
        if self.parts == "3d":
            return [self.head(self.fusion(self.inter(volume)))]
        within = self.intra(neighbours(volume, STACK))
        scores = self.score(within)
        if self.parts == "2d":
            return [scores]
        known = torch.cat([volume, scores.float().softmax(1).to(volume.dtype)], dim=1) if self.context else volume
        return [self.head(self.fusion(self.inter(known) + within)), scores]

    def forward(self, volume: Tensor) -> Tensor:
        return self.outputs(volume)[0]


@dataclass
class HDense(VolumeNetwork, DeeplySupervised):
    """A 2D and a 3D DenseUNet, joined; the 2D network's scores are supervised beside the result.

    parts    2d or 3d: one of the two alone, all else equal
    context  False: without auto-context
    deep     False: the result alone is supervised
    """

    parts: Literal["2d", "3d", "both"] = "both"
    context: bool = True

    def model(self, inputs: int, classes: int) -> nn.Module:
        return HDenseUNet(inputs=inputs, classes=classes, stem=self.channels[0], parts=self.parts, context=self.context)


recipe = Recipe(
    paper="h-denseunet",
    title="H-DenseUNet: 2D and 3D features, joined",
    claim="A 3D DenseUNet that is told what a 2D one finds in the slices, and adds its features, reaches a higher Dice "
    "on the hippocampus than a 3D U-Net.",
    arms={
        "unet": Arm(BASELINE),
        "h-denseunet": Arm(HDense()),
        "3d alone": Arm(HDense(parts="3d")),
        "2d alone": Arm(HDense(parts="2d")),
        "without auto-context": Arm(HDense(context=False)),
        "result alone supervised": Arm(HDense(deep=False)),
    },
    compare=("h-denseunet", "unet"),
    ablation=("h-denseunet", "3d alone"),
    replicate="fold",
    scales=scales("unet", "h-denseunet", "3d alone"),
    source="the official code, github.com/xmengli/H-DenseUNet",
    components=(
        Component(
            "2D DenseUNet",
            "simplified",
            "on stacks of three slices along the first axis, with the official dense layers, compression and "
            "summed long connections; blocks of 2, 3 and 4 layers that add 8 channels (official: 6, 12, 36 and 24 that "
            "add 48), a stem at full resolution (official: a quarter), not trained on ImageNet",
        ),
        Component(
            "3D DenseUNet",
            "simplified",
            "as narrow as the 2D one (official: 3, 4, 12, 8 layers that add 32); it halves all three axes, for voxels "
            "are as deep as wide, and has the long connections too, which the official 3D code leaves out",
        ),
        Component(
            "auto-context",
            "implemented",
            "the 2D network's class probabilities join the volume as channels; the official code takes its scores, "
            "times 250, beside CT numbers",
        ),
        Component(
            "hybrid feature fusion",
            "implemented",
            "features are added, then a 3 x 3 x 3 convolution and the result; without the official dropout",
        ),
        Component(
            "end-to-end learning",
            "implemented",
            "one stage, with a loss on the 2D scores beside that on the result; the paper trains the 2D network first, "
            "then the 3D one, then both",
        ),
        Component("weighted cross-entropy", "absent", "the book's loss, so that arms differ in the network alone"),
        Component("liver before tumour", "absent", "no livers at hand: the hippocampus, in one stage"),
    ),
)
