"""STU-Net (Huang, Wang, Deng, Ye, Su, Sun, He, Gu, Gu, Zhang and Qiao, arXiv 2304.06716, 2023).

A U-Net of nnU-Net is made of blocks that let it grow: residual ones, so that it can be deep, with the downsampling in
the first block of a stage; and interpolation in place of transposed convolutions, so that no weight depends on the
strides of a task and all but the head carry over to another one. Depth and width then grow together.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medcook.recipes.recipe import Arm, Component, Recipe
from medcook.recipes.volumes._settings import BASELINE, VolumeNetwork, scales

SMALL, LARGE = (4, 8, 16, 32), (8, 16, 32, 64)
WIDE = (11, 22, 44, 88)
"""With one block in each stage, within 3% as many multiply-adds as LARGE has with two."""


class Residual(nn.Module):
    """(B, inputs, D, H, W) to (B, outputs, D', H', W'), sides divided by `stride` and rounded up.

    Two 3 x 3 x 3 convolutions with instance normalisation, the first with the stride, and a shortcut around them: the
    input's 1 x 1 x 1 convolution with the same stride, or without a `stride` the input itself.
    """

    def __init__(self, inputs: int, outputs: int, stride: tuple[int, ...] | None = None):
        super().__init__()
        self.first = nn.Conv3d(inputs, outputs, 3, stride or 1, padding=1, bias=False)
        self.second = nn.Conv3d(outputs, outputs, 3, padding=1, bias=False)
        self.norms = nn.ModuleList(nn.GroupNorm(outputs, outputs) for _ in range(2))
        self.shortcut = nn.Conv3d(inputs, outputs, 1, stride) if stride else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        inner = F.leaky_relu(self.norms[0](self.first(x)))
        return F.leaky_relu(self.norms[1](self.second(inner)) + self.shortcut(x))


def stage(inputs: int, outputs: int, depth: int, stride: tuple[int, ...] = (1, 1, 1)) -> nn.Sequential:
    """`depth` residual blocks; the first changes channels and grid."""
    rest = (Residual(outputs, outputs) for _ in range(depth - 1))
    return nn.Sequential(Residual(inputs, outputs, stride), *rest)


class Upsample(nn.Module):
    """(B, inputs, D, H, W) to (B, outputs, *size): the nearest voxel, then a 1 x 1 x 1 convolution.

    A transposed convolution would have a weight of the shape of the stride; this one fits every stride. Both steps
    commute, so that the convolution comes first, where there are fewer voxels.
    """

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.mix = nn.Conv3d(inputs, outputs, 1)

    def forward(self, x: Tensor, size: torch.Size) -> Tensor:
        return F.interpolate(self.mix(x), size=size, mode="nearest")


class STUNet(nn.Module):
    """(B, inputs, D, H, W) to logits (B, classes, D, H, W).

    channels  of each stage, its width
    depth     residual blocks in each stage of encoder and decoder
    strides   between the stages, one for each axis; no weight depends on them
    """

    def __init__(
        self,
        *,
        inputs: int,
        classes: int,
        channels: tuple[int, ...],
        depth: int,
        strides: tuple[tuple[int, ...], ...] | None = None,
    ):
        super().__init__()
        pairs = list(zip(channels, channels[1:], strict=False))
        strides = strides or ((2, 2, 2),) * len(pairs)
        self.stem = stage(inputs, channels[0], depth)
        self.down = nn.ModuleList(stage(i, o, depth, s) for (i, o), s in zip(pairs, strides, strict=True))
        self.up = nn.ModuleList(Upsample(deep, fine) for fine, deep in reversed(pairs))
        self.join = nn.ModuleList(stage(2 * fine, fine, depth) for fine, _ in reversed(pairs))
        self.head = nn.Conv3d(channels[0], classes, 1)
        for module in self.modules():
            if isinstance(module, nn.Conv3d):
                nn.init.kaiming_normal_(module.weight, a=1e-2)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, image: Tensor) -> Tensor:
        levels = [self.stem(image)]
        for down in self.down:
            levels.append(down(levels[-1]))
        x = levels.pop()
        for up, join in zip(self.up, self.join, strict=True):
            skip = levels.pop()
            x = join(torch.cat([up(x, skip.shape[2:]), skip], dim=1))
        return self.head(x)


def transfer(source: STUNet, target: STUNet) -> None:
    """Copy all weights but the head's into a network for other classes, strides or input channels.

    The first convolutions of a network with one input channel are repeated for each channel of the target.
    """
    known, own = source.state_dict(), target.state_dict()
    for name, weight in known.items():
        if weight.ndim == 5 and weight.shape[1] == 1 and own[name].shape[1] > 1:
            known[name] = weight.repeat(1, own[name].shape[1], 1, 1, 1)
    target.load_state_dict({name: own[name] if name.startswith("head.") else known[name] for name in own})


@dataclass
class Scalable(VolumeNetwork):
    """STU-Net of one depth and width: `depth` residual blocks in each stage, `channels` wide."""

    channels: tuple[int, ...] = LARGE
    depth: int = 2

    def model(self, inputs: int, classes: int) -> nn.Module:
        return STUNet(inputs=inputs, classes=classes, channels=self.channels, depth=self.depth)


recipe = Recipe(
    paper="stu-net",
    title="U-Nets that scale in depth and width",
    claim="Twice as wide and twice as deep, a residual U-Net reaches a higher Dice on hippocampi.",
    arms={
        "unet": Arm(BASELINE),
        "small": Arm(Scalable(channels=SMALL, depth=1)),
        "large": Arm(Scalable()),
        "wider alone": Arm(Scalable(channels=WIDE, depth=1)),
    },
    compare=("large", "small"),
    ablation=("large", "wider alone"),
    replicate="fold",
    scales=scales(),
    published={"TotalSegmentator, 104 classes, STU-Net-H": 0.9006, "TotalSegmentator, 104 classes, nnU-Net": 0.8676},
    source="the group's project page, uni-medical.github.io/gmai-web/projects/stu-net; blocks: the code of the authors",
    components=(
        Component(
            "residual blocks",
            "implemented",
            "two convolutions and a shortcut, a 1 x 1 x 1 convolution with the stride where a stage begins: the first "
            "block of a stage also halves the grid; instance normalisation and leaky ReLU as in nnU-Net",
        ),
        Component(
            "upsampling without strides in its weights",
            "implemented",
            "nearest voxel and 1 x 1 x 1 convolution, in the order that is cheaper and gives the same; weights of one "
            "set of strides fit any other",
        ),
        Component(
            "scaling of depth and width together",
            "simplified",
            "one step of scaling, 0.08 to 0.70 million parameters, 4 stages (the paper's: 14.6 million to 1.46 billion "
            "and 6 stages); the step is the paper's from base to large, width and depth times two. Against it stands "
            "width alone, with 2% fewer multiply-adds and 10% fewer parameters; depth alone, 8 blocks of 4 channels, "
            "would cost four steps of the U-Net and is left out",
        ),
        Component(
            "transfer of weights",
            "implemented",
            "all weights but the head's load into a network for other classes, strides or input channels; what "
            "fine-tuning gains is not measured, for want of a second set of volumes",
        ),
        Component(
            "supervised training on a large set", "absent", "TotalSegmentator's 1204 volumes are beyond two cores"
        ),
        Component("direct inference on 14 sets", "absent", "there are no pre-trained weights here to infer with"),
        Component(
            "training of nnU-Net",
            "absent",
            "the book's loss at the finest head alone, its optimiser and augmentation, as for every arm",
        ),
    ),
)
