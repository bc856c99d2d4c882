"""Multi-scale in multi-scale subtraction (Zhao, Jia, Pang, Lv, Tian, Zhang, Sun and Lu, arXiv 2303.10894, 2023).

To add or to concatenate two levels of an encoder passes on what both say; their difference is what only one of them
says. Subtraction units compare neighbouring levels, at several scales within a level, then each other's results, and a
decoder adds up what they find. A frozen network, LossNet, compares prediction and label by their features as well.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medcook.data.case import IGNORE
from medcook.losses import find_loss
from medcook.methods import Batch, Moment
from medcook.networks.unet import DoubleConv
from medcook.recipes.architectures._blocks import resized
from medcook.recipes.architectures._settings import BASELINE, CHANNELS, Architecture, scales
from medcook.recipes.recipe import Arm, Component, Recipe

SIDES = (1, 3, 5)
"""Sides of the box filters of a subtraction unit, in pixels."""


def box(x: Tensor, side: int) -> Tensor:
    """The mean over a square of each channel (B, C, H, W), zeros outside: the paper's filter of ones, over its size."""
    return F.avg_pool2d(x, side, stride=1, padding=side // 2)


def compared(fine: Tensor, coarse: Tensor, sides: tuple[int, ...] = SIDES, subtract: bool = True) -> Tensor:
    """Sum over the sides of |box(fine) - box(coarse)|, for maps (B, C, H, W) and (B, C, h, w): (B, C, H, W).

    Boxes are linear, so that the box of the difference is the difference of the boxes. Without `subtract` the two maps
    are added where they would be subtracted, and all else stays.
    """
    coarse = resized(coarse, fine.shape[2:])
    both = fine - coarse if subtract else fine + coarse
    return sum((box(both, side) if side > 1 else both).abs() for side in sides)


def convolved(inputs: int, outputs: int) -> nn.Sequential:
    """A 3 x 3 convolution, batch normalisation and a ReLU."""
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU())


class Pyramid(nn.Module):
    """Features of every level (B, C, H, W), finest first, to what separates each from the levels below it.

    Row by row: each unit compares two neighbours of the row above, so that the first row sees pairs of levels, the next
    one triples, and the last one all of them. A level's result is the sum of the units that stand on its grid.
    """

    def __init__(self, levels: int, channels: int, *, sides: tuple[int, ...] = SIDES, subtract: bool = True):
        super().__init__()
        self.sides, self.subtract = sides, subtract
        rows = range(levels - 1, 0, -1)
        self.units = nn.ModuleList(nn.ModuleList(convolved(channels, channels) for _ in range(row)) for row in rows)

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        row, sums = features, [0.0] * (len(features) - 1)
        for units in self.units:
            pairs = zip(units, row, row[1:], strict=False)
            row = [unit(compared(fine, coarse, self.sides, self.subtract)) for unit, fine, coarse in pairs]
            sums = [total + found for total, found in zip(sums, row, strict=False)] + sums[len(row) :]
        return sums


class SubtractionNet(nn.Module):
    """The book's encoder, a pyramid of subtraction units, a decoder of sums: to logits (B, classes, H, W).

    width  channels to which every level is reduced
    """

    def __init__(
        self, *, inputs: int, classes: int, channels: tuple[int, ...] = CHANNELS, width: int = 8, **comparison
    ):
        super().__init__()
        self.down = nn.ModuleList(DoubleConv(i, o, 2) for i, o in zip((inputs, *channels), channels, strict=False))
        self.reduce = nn.ModuleList(convolved(each, width) for each in channels)
        self.pyramid = Pyramid(len(channels), width, **comparison)
        self.deepest = convolved(channels[-1], width)
        self.up = nn.ModuleList(convolved(width, width) for _ in channels[1:])
        self.head = nn.Conv2d(width, classes, 1)

    def forward(self, image: Tensor) -> Tensor:
        levels = [self.down[0](image)]
        for block in self.down[1:]:
            levels.append(block(F.max_pool2d(levels[-1], 2)))
        apart = self.pyramid([reduce(level) for reduce, level in zip(self.reduce, levels, strict=True)])
        x = self.deepest(levels[-1])
        for block, found in zip(reversed(self.up), reversed(apart), strict=True):
            x = block(resized(x, found.shape[2:]) + found)
        return self.head(x)


class LossNet(nn.Module):
    """How far two label maps (B, classes, H, W) are apart for a frozen network: a scalar.

    Four blocks of two convolutions with pooling between them, as VGG-16 begins; the weights are random, from a seed of
    their own, and never trained. The mean squared differences of the blocks are added, from edges to structures.
    """

    def __init__(self, classes: int, widths: tuple[int, ...] = (8, 16, 32, 64), seed: int = 0):
        super().__init__()
        rng = torch.Generator().manual_seed(seed)
        self.blocks = nn.ModuleList()
        for inputs, outputs in zip((classes, *widths), widths, strict=False):
            layers = [nn.Conv2d(sizes, outputs, 3, padding=1, bias=False) for sizes in (inputs, outputs)]
            for layer in layers:
                nn.init.kaiming_normal_(layer.weight, generator=rng)
            self.blocks.append(nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU()))
        self.requires_grad_(False)

    def forward(self, guess: Tensor, truth: Tensor) -> Tensor:
        distance = guess.new_zeros(())
        for number, block in enumerate(self.blocks):
            if number:
                guess, truth = F.max_pool2d(guess, 2), F.max_pool2d(truth, 2)
            guess, truth = block(guess), block(truth)
            distance = distance + F.mse_loss(guess.float(), truth.float())
        return distance


@dataclass
class M2SNet(Architecture):
    """A network of subtraction units, trained with LossNet beside the book's loss.

    width     channels of every level after its reduction
    subtract  False: the units add what they would subtract, all else equal
    sides     of the boxes within a unit; (1,) is the unit of a single scale
    lossnet   weight of LossNet's distance; 0: without it
    """

    width: int = 8
    subtract: bool = True
    sides: tuple[int, ...] = SIDES
    lossnet: float = 0.1

    def model(self, inputs: int, classes: int) -> nn.Module:
        comparison = {"sides": self.sides, "subtract": self.subtract}
        return SubtractionNet(inputs=inputs, classes=classes, channels=self.channels, width=self.width, **comparison)

    def build(self, inputs: int, classes: int, dims: int) -> nn.ModuleDict:
        nets = super().build(inputs, classes, dims)
        if self.lossnet:
            nets["lossnet"] = LossNet(classes)
        return nets

    def training_step(self, nets: nn.ModuleDict, labelled: Batch, unlabelled: Batch | None, now: Moment) -> Tensor:
        logits = nets["model"](labelled.images).float()
        loss = find_loss(self.loss)(logits, labelled.labels)
        if not self.lossnet:
            return loss
        truth = torch.stack([labelled.labels == value for value in range(logits.shape[1])], dim=1).float()
        guess = logits.softmax(1) * (labelled.labels != IGNORE)[:, None]
        return loss + self.lossnet * nets["lossnet"](guess, truth)


recipe = Recipe(
    paper="m2snet",
    title="M2SNet: subtraction in place of concatenation",
    claim="Levels compared by multi-scale subtraction segment hearts with a higher Dice than levels concatenated in a "
    "U-Net.",
    arms={
        "unet": Arm(BASELINE),
        "m2snet": Arm(M2SNet()),
        "addition": Arm(M2SNet(subtract=False)),
        "single scale": Arm(M2SNet(sides=(1,))),
        "without LossNet": Arm(M2SNet(lossnet=0.0)),
    },
    compare=("m2snet", "unet"),
    ablation=("m2snet", "addition"),
    replicate="fold",
    scales=scales("unet", "m2snet", "addition"),
    source="the abstract gives no figures; how units and decoder are joined, and the weight 0.1 of LossNet, follow the "
    "official code, github.com/Xiaoqi-Zhao-DLUT/MSNet-M2SNet",
    components=(
        Component(
            "subtraction unit",
            "implemented",
            "absolute difference of a level and the one below it, upsampled bilinearly; then a 3 x 3 convolution",
        ),
        Component(
            "intra-layer multi-scale",
            "implemented",
            "differences of means over 1, 3 and 5 pixels, added. We read the filters of ones channel by channel and "
            "divide by their size, so that no normalisation follows; the official code also sums over channels and "
            "then needs batch normalisation and a ReLU",
        ),
        Component(
            "inter-layer multi-scale",
            "implemented",
            "a pyramid of ten units over five levels; the sum on each level goes to the decoder without the extra "
            "convolution of the official code",
        ),
        Component(
            "LossNet",
            "simplified",
            "four frozen blocks with random weights of a fixed seed, a few channels wide, over probabilities of all "
            "classes at once; the paper's are VGG-16's, trained on ImageNet",
        ),
        Component(
            "backbone",
            "simplified",
            "the encoder of the book's U-Net from scratch, levels reduced to 8 channels; the paper's is a Res2Net-50 "
            "trained on ImageNet, reduced to 64, and its finest level a quarter of the image",
        ),
        Component("eleven data sets", "absent", "tested on hearts alone"),
    ),
)
