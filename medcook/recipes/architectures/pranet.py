"""Parallel reverse attention, PraNet (Fan, Ji, Zhou, Chen, Fu, Shen and Shao, MICCAI 2020; arXiv 2006.11392).

The three deepest levels of an encoder are enough for a first, coarse map of where the structure is. What this map has
found is then erased from the features, so that the next look is at what it missed, mostly the boundary, and its
findings are added to the map. Three such looks follow each other, from the deepest level to the finest of the three.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medcook.networks.unet import DoubleConv
from medcook.recipes.architectures._blocks import resized
from medcook.recipes.architectures._settings import BASELINE, CHANNELS, DeeplySupervised, scales
from medcook.recipes.recipe import Arm, Component, Recipe


def reverse(logits: Tensor) -> Tensor:
    """1 - softmax, (B, classes, H, W): for every class, where it is not yet found.

    With two classes and a background logit of zero this is the paper's 1 - sigmoid of the foreground.
    """
    return 1 - logits.float().softmax(1)


class ConvNorm(nn.Sequential):
    """A convolution that keeps height and width, and batch normalisation."""

    def __init__(self, inputs: int, outputs: int, kernel: int | tuple[int, int], dilation: int = 1, groups: int = 1):
        convolution = nn.Conv2d(inputs, outputs, kernel, padding="same", dilation=dilation, groups=groups, bias=False)
        super().__init__(convolution, nn.BatchNorm2d(outputs))


class ReceptiveField(nn.Module):
    """(B, inputs, H, W) to (B, width, H, W): four branches see 1, 9, 15 and 21 pixels wide, and are put together.

    Each of the last three is a 1 x k, a k x 1 and a 3 x 3 convolution of dilation k, with k = 3, 5, 7.
    """

    def __init__(self, inputs: int, width: int):
        super().__init__()
        self.branches = nn.ModuleList([ConvNorm(inputs, width, 1)])
        for k in (3, 5, 7):
            lines = ConvNorm(width, width, (1, k)), ConvNorm(width, width, (k, 1))
            self.branches.append(nn.Sequential(ConvNorm(inputs, width, 1), *lines, ConvNorm(width, width, 3, k)))
        self.join = ConvNorm(4 * width, width, 3)
        self.shortcut = ConvNorm(inputs, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.join(torch.cat([branch(x) for branch in self.branches], dim=1)) + self.shortcut(x))


class PartialDecoder(nn.Module):
    """Three levels, fine to deep, each (B, width, ., .), to the logits of the global map on the grid of the finest.

    A finer level is multiplied by every deeper one, upsampled: it counts where all of them agree.
    """

    def __init__(self, width: int, classes: int):
        super().__init__()
        self.deep_middle, self.deep_fine, self.middle_fine, self.carry_deep = (
            ConvNorm(width, width, 3) for _ in range(4)
        )
        self.join_middle, self.carry_middle = (ConvNorm(2 * width, 2 * width, 3) for _ in range(2))
        self.join_fine, self.last = (ConvNorm(3 * width, 3 * width, 3) for _ in range(2))
        self.head = nn.Conv2d(3 * width, classes, 1)

    def forward(self, fine: Tensor, middle: Tensor, deep: Tensor) -> Tensor:
        at_middle = resized(deep, middle.shape[2:])
        at_fine = resized(deep, fine.shape[2:])
        agreed = self.deep_fine(at_fine) * self.middle_fine(resized(middle, fine.shape[2:])) * fine
        middle = torch.cat([self.deep_middle(at_middle) * middle, self.carry_deep(at_middle)], dim=1)
        middle = resized(self.join_middle(middle), fine.shape[2:])
        return self.head(self.last(self.join_fine(torch.cat([agreed, self.carry_middle(middle)], dim=1))))


class ReverseAttention(nn.Module):
    """Features (B, inputs, H, W) and the logits of a map (B, classes, H, W) to better logits: the map, corrected.

    Each class has convolutions of its own, `width` channels wide, which see the features where it is not yet found.
    erase  False: they see them everywhere
    """

    def __init__(self, inputs: int, classes: int, *, kernel: int, depth: int, width: int = 8, erase: bool = True):
        super().__init__()
        self.erase, self.width = erase, width
        self.reduce = nn.Conv2d(inputs, classes * width, 1, bias=False)
        self.norm = nn.BatchNorm2d(classes * width)
        self.convolutions = nn.ModuleList(
            ConvNorm(classes * width, classes * width, kernel, groups=classes) for _ in range(depth)
        )
        self.head = nn.Conv2d(classes * width, classes, 1, groups=classes)

    def correction(self, features: Tensor, logits: Tensor) -> Tensor:
        """(B, classes, H, W); a 1 x 1 convolution is linear, so that erasing after it is erasing before it."""
        x = self.reduce(features)
        if self.erase:
            x = x * reverse(logits).to(x.dtype).repeat_interleave(self.width, dim=1)
        x = self.norm(x)
        for convolution in self.convolutions:
            x = F.relu(convolution(x))
        return self.head(x)

    def forward(self, features: Tensor, logits: Tensor) -> Tensor:
        logits = resized(logits, features.shape[2:])
        return logits + self.correction(features, logits)


class PraNet(nn.Module):
    """(B, inputs, H, W) to logits (B, classes, H, W); the encoder is that of the book's U-Net.

    stages  how many reverse attentions correct the global map, at most 3; `erase` of each as above
    """

    def __init__(
        self,
        *,
        inputs: int,
        classes: int,
        channels: tuple[int, ...] = CHANNELS,
        width: int = 16,
        stages: int = 3,
        erase: bool = True,
    ):
        super().__init__()
        self.down = nn.ModuleList(DoubleConv(i, o, 2) for i, o in zip((inputs, *channels), channels, strict=False))
        self.fields = nn.ModuleList(ReceptiveField(c, width) for c in channels[-3:])
        self.decoder = PartialDecoder(width, classes)
        shapes = zip(channels[:-4:-1], (5, 3, 3), (3, 2, 2), strict=True)
        self.corrections = nn.ModuleList(
            ReverseAttention(c, classes, kernel=kernel, depth=depth, erase=erase) for c, kernel, depth in shapes
        )[:stages]

    def outputs(self, image: Tensor) -> list[Tensor]:
        """The maps at the size of the image: the last correction first, the global map last."""
        levels = [self.down[0](image)]
        for block in self.down[1:]:
            levels.append(block(F.max_pool2d(levels[-1], 2)))
        levels = levels[-3:]
        maps = [self.decoder(*(field(level) for field, level in zip(self.fields, levels, strict=True)))]
        for correct, level in zip(self.corrections, reversed(levels), strict=False):
            maps.insert(0, correct(level, maps[0]))
        return [resized(logits, image.shape[2:]) for logits in maps]

    def forward(self, image: Tensor) -> Tensor:
        return self.outputs(image)[0]


@dataclass
class Pra(DeeplySupervised):
    """A partial decoder whose map is corrected by reverse attention, all four maps supervised.

    erase   False: the corrections see all features, all else equal
    stages  0: the global map alone
    """

    erase: bool = True
    stages: int = 3

    def model(self, inputs: int, classes: int) -> nn.Module:
        return PraNet(inputs=inputs, classes=classes, channels=self.channels, stages=self.stages, erase=self.erase)


recipe = Recipe(
    paper="pranet",
    title="Parallel reverse attention",
    claim="A coarse map, corrected by looking where it found nothing, reaches a higher Dice on hearts than a U-Net.",
    arms={
        "unet": Arm(BASELINE),
        "pranet": Arm(Pra()),
        "without erasing": Arm(Pra(erase=False)),
        "global map alone": Arm(Pra(stages=0)),
        "last map supervised": Arm(Pra(deep=False)),
    },
    compare=("pranet", "unet"),
    ablation=("pranet", "without erasing"),
    replicate="fold",
    scales=scales("unet", "pranet", "without erasing"),
    published={"Kvasir, Dice": 0.8939, "CVC-ClinicDB, Dice": 0.8984, "ETIS, Dice": 0.6275},
    source="table 1 in the README of github.com/ai4colonoscopy/PraNet-V2, where the authors evaluate it again as V1",
    components=(
        Component(
            "parallel partial decoder",
            "implemented",
            "receptive-field blocks of 16 channels (the paper's: 32) on the three deepest levels, here a quarter to a "
            "sixteenth of the image (the paper's: an eighth to a thirty-second), multiplied and joined to a global map",
        ),
        Component(
            "reverse attention",
            "implemented",
            "the paper has one structure and 1 - sigmoid; here 1 - softmax, and each class, the background too, has "
            "convolutions of its own on the features from which it is erased (our reading; its authors later called "
            "the first design limited for several classes)",
        ),
        Component(
            "cooperation of areas and boundaries",
            "implemented",
            "three corrections, deepest first, each added to the map before it; 8 channels for each class",
        ),
        Component("deep supervision", "implemented", "the global map and its three corrections, with equal weight"),
        Component(
            "encoder",
            "simplified",
            "that of the book's U-Net, trained from scratch; the paper's is a Res2Net-50 trained on ImageNet",
        ),
        Component(
            "weighted IoU and cross-entropy", "absent", "the book's loss, so that arms differ in the network alone"
        ),
        Component("generalisation to unseen sets", "absent", "hearts of one data set, not polyps of five"),
        Component("real-time speed", "absent", "seconds are recorded with every run; the claim here is about Dice"),
    ),
)
