"""NuClick: a framework for interactive segmentation of microscopy images (Alemi Koohbanani, Jahanifar, Zamani Tajadin
and Rajpoot, Medical Image Analysis 2020; arXiv 2005.14511).

Whoever annotates an image clicks once in every object, and so everybody knows more than one click about each: the
clicks of its neighbours. The network sees beside the image an inclusion map, the click in the object, and an exclusion
map, the clicks in all others. It answers once. Glands get a squiggle in place of the click. In training clicks vary and
neighbours' clicks are moved or left out, so that the answer depends little on where exactly somebody clicks.

  loss = soft Dice + mean(w * cross-entropy),  w = 1 on background, 2 on neighbours, 2 + |neighbours| / |object| on it

Here an object is a structure of the heart, and its neighbours are the other structures of the slice.
"""

import zlib
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from skimage.morphology import skeletonize
from torch import Tensor, nn

from medcook.data import IGNORE, Case
from medcook.evaluation import row
from medcook.interactive import BESIDE, MEANT, Guided, chosen_structure, gaussians, no_marks, overlap
from medcook.losses import soft_dice
from medcook.methods import Batch, Moment
from medcook.precision import autocast
from medcook.recipes.architectures._blocks import resized
from medcook.recipes.interactive._settings import BASELINE, CHANNELS, HEARTS, scales
from medcook.recipes.recipe import Arm, Component, Recipe
from medcook.sam.prompts import deepest
from medcook.sampling import trained

MIDDLE, NARROW, WIDE = ((3, 3, 5, 5), (1, 3, 3, 6)), ((3, 3, 5, 5), (1, 3, 2, 3)), ((3, 3, 5, 7), (1, 3, 3, 6))
"""Kernels and dilations of a multi-scale block: the one on the way down, and the two on the way up."""


def convolved(inputs: int, outputs: int, kernel: int = 3, dilation: int = 1, relu: bool = True) -> nn.Sequential:
    """A convolution that keeps the size, batch normalisation, and a ReLU."""
    conv = nn.Conv2d(inputs, outputs, kernel, padding=dilation * (kernel // 2), dilation=dilation, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU() if relu else nn.Identity())


class Residual(nn.Module):
    """(B, inputs, H, W) to (B, outputs, H, W): a convolution, and another one that is added to it."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.first, self.second = convolved(inputs, outputs, relu=False), convolved(outputs, outputs, relu=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return F.relu(x + self.second(x))


class MultiScale(nn.Module):
    """(B, C, H, W) to the same: four convolutions side by side, each of its own reach and with a quarter of C."""

    def __init__(self, channels: int, reaches: tuple[tuple[int, ...], tuple[int, ...]]):
        super().__init__()
        self.paths = nn.ModuleList(convolved(channels, channels // 4, *reach) for reach in zip(*reaches, strict=True))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([path(x) for path in self.paths], dim=1)


class NuClickNet(nn.Module):
    """Five levels of residual and multi-scale blocks, skips between them: (B, inputs, H, W) to logits (B, 2, H, W)."""

    def __init__(self, inputs: int, channels: tuple[int, ...]):
        super().__init__()
        one, two, three, four, five = channels
        down = (
            (convolved(inputs, one, 7), convolved(one, one, 5), convolved(one, one)),
            (Residual(one, two), Residual(two, two)),
            (Residual(two, three), MultiScale(three, MIDDLE), Residual(three, three)),
            (Residual(three, four), Residual(four, four)),
            (Residual(four, five), Residual(five, five)),
        )
        up = (
            (Residual(2 * four, four), MultiScale(four, NARROW), Residual(four, four)),
            (Residual(2 * three, three),),
            (Residual(2 * two, two), MultiScale(two, WIDE), Residual(two, two)),
            (convolved(2 * one, one), convolved(one, one)),
        )
        self.down, self.up = (nn.ModuleList(nn.Sequential(*blocks) for blocks in way) for way in (down, up))
        deep = channels[::-1]
        self.larger = nn.ModuleList(nn.ConvTranspose2d(i, o, 2, 2) for i, o in zip(deep, deep[1:], strict=False))
        self.head = nn.Conv2d(one, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        skips = [self.down[0](x)]
        for block in self.down[1:]:
            skips.append(block(F.max_pool2d(skips[-1], 2)))
        x = skips.pop()
        for block, larger in zip(self.up, self.larger, strict=True):
            skip = skips.pop()
            x = block(torch.cat([resized(larger(x), skip.shape[2:]), skip], dim=1))
        return self.head(x)


def inner(mask: np.ndarray, depth: float) -> np.ndarray:
    """The pixels of a mask that lie deeper than its mean depth plus `depth` of its standard deviations; never none."""
    deep = ndimage.distance_transform_edt(np.pad(mask, 1))[1:-1, 1:-1]
    bar = deep[mask].mean() + depth * deep[mask].std()
    return deep > min(max(bar, 0), deep.max() - 1)


def squiggle(mask: np.ndarray, depth: float) -> np.ndarray:
    """A line through a mask: the skeleton of its inner part."""
    return skeletonize(inner(mask, depth))


def moved(place: tuple[int, ...], size: tuple[int, ...], by: int) -> tuple[int, ...]:
    """A pixel at most `by` pixels away along every axis, at random, and in the image."""
    steps = torch.randint(-by, by + 1, (len(place),)).tolist()
    return tuple(min(max(at + step, 0), side - 1) for at, step, side in zip(place, steps, size, strict=True))


def neighbours_clicks(labels: Tensor, truth: Tensor, by: int, most: float) -> Tensor:
    """(B, H, W) bool: a click in the middle of every structure of labels (B, H, W) that truth (B, H, W) is not about.

    Each is moved by up to `by` pixels and left out by a chance which is drawn for each image, from 0 to `most`.
    """
    clicks = torch.zeros_like(truth)
    for number, (label, mine) in enumerate(zip(labels, truth, strict=True)):
        chance = most * torch.rand(()).item()
        for value in label[(label != 0) & (label != IGNORE) & ~mine].unique().tolist():
            if torch.rand(()).item() >= chance:
                middle = deepest((label == value).cpu().numpy())
                clicks[(number, *moved(middle, tuple(label.shape), by))] = True
    return clicks


def weights(target: Tensor, others: Tensor) -> Tensor:
    """(B, H, W) float32: what a pixel's cross-entropy counts, of target (B, H, W) and others (B, H, W) bool."""
    mine = target == 1
    share = others.flatten(1).sum(1) / mine.flatten(1).sum(1).clamp_min(1)
    return torch.where(mine, 2 + share.view(-1, 1, 1), torch.where(others, 2.0, 1.0))


@dataclass
class NuClick(Guided):
    """A multi-scale residual U-Net that sees an inclusion and an exclusion map and answers once.

    guide      what a person makes in an object: a click or a squiggle
    exclusion  False: the exclusion map stays empty
    jitter     by how many pixels neighbours' clicks are moved in training; `drop`: the largest chance to leave one out
    """

    channels: tuple[int, ...] = CHANNELS
    rounds: int = 1
    guide: Literal["click", "squiggle"] = "click"
    exclusion: bool = True
    jitter: int = 3
    drop: float = 0.5

    axes = 2
    guides = 2

    def backbone(self, inputs: int, dims: int) -> nn.Module:
        return NuClickNet(inputs, self.channels)

    def guidance(self, marks: Tensor, before: Tensor | None) -> Tensor:
        """(B, 2, H, W): the inclusion and the exclusion map; the answer before is not seen."""
        maps = gaussians(marks, self.sigma)
        return maps if self.exclusion else torch.cat([maps[:, [MEANT]], torch.zeros_like(maps[:, [BESIDE]])], dim=1)

    def first(self, truth: Tensor) -> Tensor:
        """Marks (B, 2, H, W): a click on a random inner pixel of each mask (B, H, W), or a squiggle in it."""
        marks = no_marks(truth)
        for number, mask in enumerate(truth.cpu().numpy()):
            if mask.any():
                depth = 2 * torch.rand(()).item() - 1
                marks[number, MEANT] = torch.from_numpy(self.signal(mask, depth)).to(truth.device)
        return marks

    def signal(self, mask: np.ndarray, depth: float) -> np.ndarray:
        """(H, W) bool: what a person makes in the inner part of an object."""
        if self.guide == "squiggle":
            return squiggle(mask, depth)
        places = np.argwhere(inner(mask, depth))
        click = np.zeros_like(mask)
        click[tuple(places[int(torch.randint(len(places), ()))])] = True
        return click

    def training_step(self, nets: nn.ModuleDict, labelled: Batch, unlabelled: Batch | None, now: Moment) -> Tensor:
        """The weighted loss of one answer about one structure of each image."""
        target = chosen_structure(labelled.labels)
        truth, known = target == 1, target != IGNORE
        marks = self.first(truth)
        marks[:, BESIDE] = neighbours_clicks(labelled.labels, truth, self.jitter, self.drop)
        logits = self.respond(nets["model"], labelled.images, marks, None).float()
        entropy = F.cross_entropy(logits, target.long(), ignore_index=IGNORE, reduction="none")
        weight = weights(target, (labelled.labels != 0) & known & ~truth)
        return soft_dice(logits, target) + (weight * entropy).sum() / known.sum().clamp_min(1)


def middles(mask: Tensor, rng: np.random.Generator | None = None, by: int = 3) -> Tensor:
    """(N, H, W) bool: a click in the middle of each mask (N, H, W) that is not empty.

    With a generator it is on a random pixel of the mask that is at most `by` pixels away along either axis.
    """
    clicks = torch.zeros_like(mask)
    for number, one in enumerate(mask.numpy()):
        if one.any():
            at = deepest(one)
            if rng is not None:
                places = np.argwhere(one)
                at = tuple(rng.choice(places[np.abs(places - at).max(1) <= by]).tolist())
            clicks[(number, *at)] = True
    return clicks


@torch.no_grad()
def one_click_rows(fitted, case: Case) -> list[dict]:
    """A row a structure: Dice over the case after one click in each structure of each slice, on the network's grid.

    dice        with clicks in the middle (or squiggles); dice_moved with clicks inside, but up to three pixels away
    All arms get the same clicks; one without an exclusion map sees only that in the structure asked for.
    """
    trained(fitted)
    method, net, task = fitted.method, fitted.nets["average"], fitted.task
    images, labels = task.preparation.images(case), task.preparation.labels(case)
    rng = np.random.default_rng(zlib.crc32(case.case_id.encode()))
    clicks = {
        name: {value: middles(labels == value, chance) for value in task.structures}
        for name, chance in (("dice", None), ("dice_moved", rng))
    }
    rows = []
    for value, structure in task.targets.items():
        there = (labels == value).flatten(1).any(1)
        if there.any():
            truth, found = labels[there] == value, {}
            for name, made in clicks.items():
                marks = torch.stack([made[value], sum(made[other] for other in made if other != value) > 0], dim=1)
                marks = marks[there]
                if getattr(method, "guide", "click") == "squiggle" and name == "dice":
                    marks[:, MEANT] = torch.from_numpy(np.stack([squiggle(mask, 0) for mask in truth.numpy()]))
                marks[:, BESIDE] &= getattr(method, "exclusion", False)
                with autocast(fitted.cost):
                    answer = method.respond(net, method.start(net, images[there]), marks, None)
                found[name] = overlap(answer.argmax(1) == 1, truth)
            rows.append(row(case, structure, **found))
    return rows


recipe = Recipe(
    paper="nuclick",
    title="NuClick: one click an object, and those of its neighbours",
    claim="After one click in each structure of a slice, a network that also sees the neighbours' clicks reaches a "
    "higher Dice than a U-Net after the same click.",
    arms={
        "unet": Arm(BASELINE),
        "nuclick": Arm(NuClick()),
        "without exclusion map": Arm(NuClick(exclusion=False)),
        "squiggles": Arm(NuClick(guide="squiggle")),
    },
    compare=("nuclick", "unet"),
    ablation=("nuclick", "without exclusion map"),
    replicate="fold",
    score=one_click_rows,
    scales=scales(HEARTS, "unet", "nuclick", "without exclusion map"),
    source="the abstract; guiding signals, network and weights of the loss follow the official code, "
    "github.com/navidstuv/NuClick, and its successor github.com/mostafajahanifar/nuclick_torch",
    components=(
        Component(
            "one click inside each object",
            "implemented",
            "structures of hearts for nuclei; on a random pixel of the inner part in training, in the middle when "
            "scored. A soft dot as in the whole chapter (the paper: one pixel is 1), on the slice and not on a patch "
            "around the click",
        ),
        Component(
            "clicks of neighbouring objects as exclusion map",
            "implemented",
            "one in each other structure of the slice, moved by up to three pixels and left out at random in training. "
            "In the middle, where the official code takes the centroid: that of a ring lies in its neighbour",
        ),
        Component(
            "squiggle as a guiding signal",
            "implemented",
            "the skeleton of the inner part, in training and score; at `full` no arm runs it: no glands are at hand",
        ),
        Component(
            "robustness against variations of the input",
            "implemented",
            "dice_moved in every row: clicks up to three pixels from the middle, inside the structure",
        ),
        Component(
            "adaptable to the object scale",
            "simplified",
            "multi-scale blocks as in the official code, at three places; five levels, narrow, two residual blocks a "
            "level and one where the code has up to three. Not tested on objects of other sizes",
        ),
        Component(
            "weighted loss",
            "implemented",
            "the weights of the official code. The baseline keeps the chapter's loss; the ablation has this one",
        ),
        Component("new domains", "absent", "hearts alone"),
        Component("masks that train an instance model", "absent", "LYON19 and its images are not at hand"),
    ),
)
