"""Barlow-Swin: Toward a novel siamese-based segmentation architecture using Swin-Transformers (arXiv 2509.06885, 2025).

A small Swin encoder of three stages, pre-trained without labels, under a light decoder. Its pretext is Barlow Twins
(Zbontar, Jing, Misra, LeCun and Deny, ICML 2021): two views of an image give vectors z and z', and over a batch each of
their entries shall agree with itself and with no other:

    C_ij = mean over b of z_bi z'_bj, both normalised over the batch
    loss = sum_i (1 - C_ii)^2 + lambda sum_i sum_{j != i} C_ij^2
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medcook.methods import Batch, Moment
from medcook.pretraining import OptionalPretext, pooled
from medcook.recipes.architectures.swin_unetr import Merge, SwinBlock
from medcook.recipes.pretraining._settings import BASELINE, BRAINS, HEARTS, scales
from medcook.recipes.recipe import Arm, Component, Recipe

LAMBDA = 5e-3
"""Of the paper that Barlow Twins are from, and of the official code of this one."""


def correlation(first: Tensor, second: Tensor) -> Tensor:
    """(D, D) cross-correlation over the batch of two views' vectors (B, D), each entry in its standard deviations."""
    one, other = ((z - z.mean(0)) / (z.std(0, unbiased=False) + 1e-5) for z in (first.float(), second.float()))
    with torch.autocast(first.device.type, enabled=False):
        return one.T @ other / len(one)


def barlow_loss(first: Tensor, second: Tensor) -> Tensor:
    """The loss of the module's docstring."""
    found = correlation(first, second)
    own = found.diagonal()
    return (1 - own).square().sum() + LAMBDA * (found.square().sum() - own.square().sum())


class ShallowSwin(nn.Module):
    """(B, inputs, H, W) to features (B, width * 2^i, H / 2^(i+1), W / 2^(i+1)), i = 0, 1, 2; sides are multiples of 8.

    A token is a patch of 2 x 2 pixels. Each stage has a block with windows of 4 x 4 tokens, and one with shifted ones.
    """

    def __init__(self, inputs: int, width: int, *, heads: int = 4, side: int = 4):
        super().__init__()
        self.embed = nn.Conv2d(inputs, width, 2, stride=2)
        self.stages = nn.ModuleList(
            nn.Sequential(*(SwinBlock(width * 2**i, heads, side, shift) for shift in (0, 1))) for i in range(3)
        )
        self.merges = nn.ModuleList(Merge(width * 2**i) for i in range(2))

    def forward(self, image: Tensor) -> list[Tensor]:
        x, found = self.embed(image).permute(0, 2, 3, 1), []
        for i, stage in enumerate(self.stages):
            x = stage(x if i == 0 else self.merges[i - 1](x))
            found.append(x.permute(0, 3, 1, 2))
        return found


def separable(inputs: int, outputs: int) -> nn.Sequential:
    """A 3 x 3 convolution of each channel, one across channels, batch normalisation and a ReLU."""
    depthwise = nn.Conv2d(inputs, inputs, 3, padding=1, groups=inputs, bias=False)
    return nn.Sequential(
        depthwise, nn.Conv2d(inputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)
    )


class Residual(nn.Module):
    """Two separable convolutions and a 1 x 1 convolution around them: (B, inputs, H, W) to (B, outputs, H, W)."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.inner = nn.Sequential(separable(inputs, outputs), separable(outputs, outputs))
        self.around = nn.Sequential(nn.Conv2d(inputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + self.around(x)


def padded(image: Tensor) -> Tensor:
    """Images (B, C, H, W) with zeros below and to the right, up to sides that are multiples of 8."""
    return F.pad(image, (0, -image.shape[3] % 8, 0, -image.shape[2] % 8))


class BarlowSwinNet(nn.Module):
    """(B, inputs, H, W) to logits (B, classes, H, W). Images are padded with zeros to multiples of 8."""

    def __init__(self, *, inputs: int, classes: int, width: int):
        super().__init__()
        self.encoder = ShallowSwin(inputs, width)
        self.up = nn.ModuleList([Residual(6 * width, 2 * width), Residual(3 * width, width)])
        self.last = Residual(width + inputs, width)
        self.head = nn.Conv2d(width, classes, 1)

    def forward(self, image: Tensor) -> Tensor:
        height, width = image.shape[2:]
        image = padded(image)
        fine, middle, x = self.encoder(image)
        for block, skip in zip((*self.up, self.last), (middle, fine, image), strict=True):
            x = block(torch.cat([F.interpolate(x, size=skip.shape[2:], mode="nearest"), skip], dim=1))
        return self.head(x)[:, :, :height, :width]


def projector(width: int, hidden: int) -> nn.Sequential:
    """(B, width) to (B, hidden), three layers, with batch normalisation and a ReLU between them."""
    between = lambda: (nn.BatchNorm1d(hidden), nn.ReLU(inplace=True))  # noqa: E731
    return nn.Sequential(
        nn.Linear(width, hidden), *between(), nn.Linear(hidden, hidden), *between(), nn.Linear(hidden, hidden)
    )


@dataclass
class BarlowSwin(OptionalPretext):
    """Barlow Twins for the encoder, then all of the network on labels; `channels` has no meaning here.

    width   features of a token of 2 x 2 pixels; twice and four times as many at a quarter and an eighth
    hidden  numbers of the vectors that the views are compared by
    """

    width: int = 12
    hidden: int = 32

    axes = 2

    def model(self, inputs: int, classes: int, dims: int) -> nn.Module:
        return BarlowSwinNet(inputs=inputs, classes=classes, width=self.width)

    def pretext_parts(self, model: nn.Module, inputs: int, dims: int) -> nn.Module:
        return projector(4 * self.width, self.hidden)

    def pretext(self, nets: nn.ModuleDict, images: Batch, now: Moment) -> Tensor:
        views = (self.view(images.images) for _ in range(2))
        first, second = (nets["pretext"](pooled(nets["model"].encoder(padded(view))[-1])) for view in views)
        return barlow_loss(first, second)


recipe = Recipe(
    paper="barlow-swin",
    title="A small Swin encoder, pre-trained by Barlow Twins",
    claim="With fewer parameters, a shallow Swin encoder that Barlow Twins prepared is as good as a U-Net (within 0.03 "
    "Dice), both trained on three labelled hearts.",
    arms={
        "unet": Arm(BASELINE),
        "barlow-swin": Arm(BarlowSwin()),
        "without Barlow Twins": Arm(BarlowSwin(waits=True)),
    },
    compare=("barlow-swin", "unet"),
    ablation=("barlow-swin", "without Barlow Twins"),
    replicate="draw",
    expect="cheaper-at-equal-quality",
    margin=0.03,
    cost="parameters",
    scales=scales(BRAINS, HEARTS),
    source="abstract and the official code (github mkianih/Barlow-Swin, a notebook in TensorFlow)",
    components=(
        Component(
            "shallow Swin encoder",
            "implemented",
            "three stages of two blocks, windows of 4 x 4 tokens that are shifted by one, as in the official code; "
            "tokens of 2 x 2 pixels with 12 features, where that code has 4 x 4 pixels of images four times as large, "
            "and 96 features; four heads for its eight; no embedding of positions beside the relative ones of windows",
        ),
        Component(
            "pre-training by Barlow Twins",
            "implemented",
            "lambda 0.005 and a projector of three layers, as in the official code, of 32 numbers for its 256; 300 "
            "steps of 8 images, whose correlations are those of few images, for 100 epochs of 16. This is the second "
            "evaluation: in the first (Dice 0.42) the optimiser kept the moments of the pretext's gradients",
        ),
        Component(
            "decoder of separable residual convolutions",
            "implemented",
            "nearest upsampling, skip connections from the stages, as in the official code; the last step also sees "
            "the image, since tokens of 2 x 2 pixels know nothing finer",
        ),
        Component(
            "real time",
            "absent",
            "parameters are what is compared; attention in small windows is slow on a CPU. The official notebook turns "
            "each image by multiples of 90 degrees before it splits them into training and test images, so the same "
            "cells are in both; here patients are split",
        ),
        Component(
            "binary tasks", "absent", "hearts have three structures; X-rays of lungs would be nearer, and too easy"
        ),
    ),
)
