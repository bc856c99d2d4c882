"""2.5D between 2D and 3D (Zhang, Liao, Ding and Zhang, Computerized Medical Imaging and Graphics 99, 2022; arXiv
2010.06163).

A network for slices is cheap and sees no depth, one for volumes sees depth and is dear. Schemes in between give a 2D
network some depth. The study compares them with both ends: all gain on 2D, none on every data set, and 3D is not always
best. Here are one scheme of each kind that keeps to 2D convolutions, under one protocol, on the hippocampus.
"""

from dataclasses import dataclass
from functools import cache

import pandas as pd
import torch
from torch import Tensor, nn

from medcook.architectures import cost_table
from medcook.losses import find_loss
from medcook.methods import Batch, Method, Moment
from medcook.recipes.architectures.u_bench import significance
from medcook.recipes.recipe import Arm, Component, Recipe
from medcook.recipes.volumes._settings import BASELINE, VolumeNetwork, scales
from medcook.recipes.volumes._slices import SliceUNet, neighbours

VOLUME = (32, 56, 40)
"""Depth, height and width of a hippocampus as prepared."""


class StackUNet(SliceUNet):
    """A 2D U-Net that sees `count` slices as channels and answers for the middle one."""

    def __init__(self, *, inputs: int, classes: int, channels: tuple[int, ...], count: int):
        super().__init__(inputs=count * inputs, classes=classes, channels=channels)
        self.count = count

    def features(self, image: Tensor) -> Tensor:
        return super().features(neighbours(image, self.count))


class SliceAttention(nn.Module):
    """(B, C, D, H, W): at every place, features ask those of the `count` nearest slices there, and add the answer.

    x_d + V sum over j of a_j x_{d+j},   a = softmax over j of (q_d . k_{d+j} / sqrt(C) + b_j),   q = Q x, k = K x
    """

    def __init__(self, channels: int, count: int):
        super().__init__()
        self.query, self.key, self.value = (nn.Conv3d(channels, channels, 1, bias=False) for _ in range(3))
        self.bias = nn.Parameter(torch.zeros(count))

    def weights(self, x: Tensor) -> Tensor:
        """(B, count, D, H, W) float32: how much each slice takes from which of its neighbours; 1 in all."""
        keys = neighbours(self.key(x), len(self.bias)).unflatten(1, (len(self.bias), -1)).float()
        scores = (self.query(x)[:, None].float() * keys).sum(2) * x.shape[1] ** -0.5
        return (scores + self.bias[:, None, None, None].float()).softmax(1)

    def forward(self, x: Tensor) -> Tensor:
        beside = neighbours(x, len(self.bias)).unflatten(1, (len(self.bias), -1))
        return x + self.value((self.weights(x).to(x.dtype)[:, :, None] * beside).sum(1))


class AttentiveUNet(SliceUNet):
    """A 2D U-Net whose encoder, once it has pooled, looks at the neighbouring slices after every level."""

    def __init__(self, *, inputs: int, classes: int, channels: tuple[int, ...], count: int):
        super().__init__(inputs=inputs, classes=classes, channels=channels)
        for level, width in enumerate(channels[1:], start=1):
            self.down[level] = nn.Sequential(self.down[level], SliceAttention(width, count))


class MultiView(nn.Module):
    """A 2D U-Net for each entry of `planes`, the axis along which it has the volume in slices.

    (B, inputs, D, H, W) to the logarithm of the views' mean probabilities (B, classes, D, H, W).
    """

    def __init__(self, *, inputs: int, classes: int, channels: tuple[int, ...], planes: tuple[int, ...]):
        super().__init__()
        self.planes = planes
        self.views = nn.ModuleList(SliceUNet(inputs=inputs, classes=classes, channels=channels) for _ in planes)

    def outputs(self, volume: Tensor) -> list[Tensor]:
        """Every view's own logits (B, classes, D, H, W)."""
        turned = [view(volume.movedim(2 + axis, 2)) for view, axis in zip(self.views, self.planes, strict=True)]
        return [logits.movedim(2, 2 + axis) for logits, axis in zip(turned, self.planes, strict=True)]

    def forward(self, volume: Tensor) -> Tensor:
        views = torch.stack([logits.float().softmax(1) for logits in self.outputs(volume)])
        return views.mean(0).clamp_min(1e-12).log()


@dataclass
class Slices(VolumeNetwork):
    """A 2D U-Net on the slices along the first axis: a step sees as many voxels as that of a 3D network."""

    def model(self, inputs: int, classes: int) -> nn.Module:
        return SliceUNet(inputs=inputs, classes=classes, channels=self.channels)


@dataclass
class SlicesAsChannels(VolumeNetwork):
    """A 2D U-Net that sees `count` neighbouring slices at once; an odd number."""

    count: int = 3

    def model(self, inputs: int, classes: int) -> nn.Module:
        return StackUNet(inputs=inputs, classes=classes, channels=self.channels, count=self.count)


@dataclass
class InterSliceFusion(VolumeNetwork):
    """A 2D U-Net whose features attend to those of `count` neighbouring slices; an odd number."""

    count: int = 3

    def model(self, inputs: int, classes: int) -> nn.Module:
        return AttentiveUNet(inputs=inputs, classes=classes, channels=self.channels, count=self.count)


@dataclass
class MultiViewFusion(VolumeNetwork):
    """Three 2D U-Nets, each trained on slices of its own plane; the mean of their probabilities predicts.

    planes  (0, 0, 0): three networks of one plane, all else equal
    """

    planes: tuple[int, ...] = (0, 1, 2)

    def model(self, inputs: int, classes: int) -> nn.Module:
        return MultiView(inputs=inputs, classes=classes, channels=self.channels, planes=self.planes)

    def training_step(self, nets: nn.ModuleDict, labelled: Batch, unlabelled: Batch | None, now: Moment) -> Tensor:
        """The mean of the views' losses: no view learns from another."""
        views = nets["model"].outputs(labelled.images)
        return sum(find_loss(self.loss)(logits.float(), labelled.labels) for logits in views) / len(views)


METHODS: dict[str, Method] = {
    "2d": Slices(),
    "3d": BASELINE,
    "slices as channels": SlicesAsChannels(),
    "inter-slice fusion": InterSliceFusion(),
    "multi-view fusion": MultiViewFusion(),
}
SCHEMES = ("slices as channels", "inter-slice fusion", "multi-view fusion")
"""The methods that are 2.5D."""


@cache
def costs() -> pd.DataFrame:
    """Parameters and multiply-adds of a volume, of every method; also over those of 2D. Counted, not computed."""
    with torch.device("meta"):
        networks = {name: method.build(1, 3, 3)["model"] for name, method in METHODS.items()}
        return cost_table(networks, torch.zeros(1, 1, *VOLUME))


def comparison(frame: pd.DataFrame) -> pd.DataFrame:
    """A row a method besides 2D: mean Dice, what it gains on 2D with interval, p and p after Holm, and its cost.

    frame  columns arm, replicate, case_id, patient_id, structure and dice; the arms are those of `METHODS`
    """
    frame = frame[frame["arm"].isin(METHODS)]
    dice = frame.groupby("arm")["dice"].mean()
    return significance(frame, "2d").join(dice).join(costs())


def conclusions(table: pd.DataFrame, level: float = 0.05) -> dict[str, list[str]]:
    """What the study asks of a table of `comparison`: which schemes gain on 2D, which do not, which are above 3D.

    A scheme gains where its mean is higher and p after Holm is below `level`; above 3D is said of the mean alone.
    """
    schemes = table.loc[[name for name in SCHEMES if name in table.index]]
    gain = (schemes["gain"] > 0) & (schemes["holm"] < level)
    return {
        "gain on 2D": list(schemes.index[gain]),
        "do not": list(schemes.index[~gain]),
        "above 3D": list(schemes.index[schemes["dice"] > table.loc["3d", "dice"]]),
    }


recipe = Recipe(
    paper="study-2.5d",
    title="2.5D between 2D and 3D: schemes under one protocol",
    claim="Fusing three 2D U-Nets, one for each plane of the volume, reaches a higher Dice on the hippocampus than one "
    "2D U-Net on the slices of one plane.",
    arms={name: Arm(method) for name, method in {**METHODS, "one plane": MultiViewFusion(planes=(0, 0, 0))}.items()},
    compare=("multi-view fusion", "2d"),
    ablation=("multi-view fusion", "one plane"),
    replicate="fold",
    scales=scales(*METHODS, "one plane"),
    components=(
        Component(
            "2D baseline",
            "implemented",
            "the U-Net's 3 x 3 convolutions and pooling on every slice along the first axis; a step sees whole volumes "
            "in every method",
        ),
        Component("3D baseline", "implemented", "the chapter's U-Net, with as many channels at each level"),
        Component("multi-view fusion", "implemented", "three planes, each view trained alone, mean probability"),
        Component("slices as channels", "implemented", "three slices"),
        Component(
            "inter-slice fusion",
            "implemented",
            "attention over three neighbouring slices at the same place, after each level of the encoder but the "
            "first; the abstract names no design, and this one is ours",
        ),
        Component("comparison", "implemented", "gain of each method on 2D, paired, after Holm; which are above 3D"),
        Component("computation cost", "implemented", "parameters and multiply-adds; seconds are in every run's record"),
        Component("fusion of 2D and 3D features", "absent", "H-DenseUNet, of that kind, has a recipe of its own"),
        Component("other schemes of each kind", "absent", "such as a learnt fusion of views, or recurrence"),
        Component("three tasks", "absent", "one: hippocampi; that gains do not hold on all sets is not tested"),
        Component("review of 2.5D methods", "absent", "text"),
    ),
)
