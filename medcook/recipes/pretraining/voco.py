"""VoCo, Volume Contrast (Wu, Zhuang and Chen, CVPR 2024; with geometric context priors: arXiv 2410.09890).

Idea: organs lie in the same order in everybody, so that who knows where a part of a volume comes from knows anatomy. A
volume is cut into n base crops, one for each region. A random crop overlaps some of them, and which ones, and how much,
is predicted by how similar its features are to theirs; no label is needed.

    y_i    share of the random crop that lies in base crop i; the sum over i is 1
    l_i    = max(0, cos(f, b_i)),  f and b_i projected features of the random crop and of base crop i
    L(l, y) = -sum_i y_i log(1 - |y_i - l_i|) / sum_i y_i  -  mean over i with y_i = 0 of log(1 - l_i)
    within = L(l, y), the base crops seen by a teacher, which follows the student's projection
    across = L(l', t'), l' and t' how similar student and teacher find the crop to the base crops of another volume
    apart  = mean over i < j of max(0, cos(b_i, b_j))^2
    loss   = within + across + apart
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medcook.image_pool import cut
from medcook.methods import Batch, Moment, own_generator
from medcook.pretraining import Projector, follow, fresh, pooled
from medcook.recipes.pretraining._settings import BRAIN_VOLUMES, HIPPOCAMPI, VOLUME_BUDGET, scales
from medcook.recipes.pretraining._volumes import VOLUME_BASELINE, VOLUME_LONGER, PretrainedOnVolumes
from medcook.recipes.recipe import Arm, Component, Recipe

GRID = (1, 3, 3)
"""Base crops along each axis: as in the official code, the first axis is not divided."""
HIDDEN, OUTPUTS = 128, 64
"""Widths of the projection, for 120 features."""
LEAST = 1e-6


def sides(size: tuple[int, ...]) -> tuple[int, ...]:
    """The size of a crop of a volume of `size`; what is left over beyond the last base crop belongs to none."""
    return tuple(whole // parts for whole, parts in zip(size, GRID, strict=True))


def corners(size: tuple[int, ...], count: int) -> Tensor:
    """(count, 3) int64: first voxels of random crops that lie within what the base crops tile."""
    free = [side * (parts - 1) for side, parts in zip(sides(size), GRID, strict=True)]
    return torch.stack([torch.randint(0, most + 1, (count,)) for most in free], dim=1)


def overlaps(first: Tensor, size: tuple[int, ...]) -> Tensor:
    """y (N, n) float32: the share of each crop at corners (N, 3) that lies in each base crop, in the order of `cut`."""
    found = torch.ones(len(first), 1, device=first.device)
    for axis, (side, parts) in enumerate(zip(sides(size), GRID, strict=True)):
        distance = (first[:, axis, None] - side * torch.arange(parts, device=first.device)).abs()
        along = (side - distance).clamp_min(0) / side
        found = (found[:, :, None] * along[:, None]).flatten(1)
    return found


def crop(volume: Tensor, first: Tensor) -> Tensor:
    """(N, C, *sides) of one volume (C, *size) at corners (N, 3)."""
    size = sides(volume.shape[1:])
    places = [tuple(slice(a, a + side) for a, side in zip(each, size, strict=True)) for each in first.tolist()]
    return torch.stack([volume[(slice(None), *place)] for place in places])


def divisible(crops: Tensor, by: int) -> Tensor:
    """Crops scaled so that their sides are multiples of what the encoder divides them by: it needs that much."""
    size = [max(1, round(side / by)) * by for side in crops.shape[2:]]
    return F.interpolate(crops, size=size, mode="trilinear", align_corners=False)


def described(net: nn.Module, crops: Tensor) -> Tensor:
    """(N, sum of channels) float32: the mean of each feature map on a U-Net's way down, all levels side by side."""
    x, found = crops, []
    for level, block in enumerate(net.down):
        x = block(net.pool(x, 2) if level else x)
        found.append(pooled(x))
    return torch.cat(found, dim=1)


def similarity(vectors: Tensor, bases: Tensor) -> Tensor:
    """l (B, m, n), 0 to 1, of vectors (B, m, D) and base crops (B, n, D): the cosine, and 0 where it is negative."""
    unit = [F.normalize(each.float(), dim=-1) for each in (vectors, bases)]
    return (unit[0] @ unit[1].mT).relu()


def position_loss(alike: Tensor, y: Tensor) -> Tensor:
    """L of similarities l and shares y, both (B, m, n), 0 to 1; the mean over all crops of a step."""
    none = (y == 0).float()
    near = -(y * torch.log(1 - (y - alike).abs() + LEAST)).sum() / (y.sum() + LEAST)
    far = -(none * torch.log(1 - alike + LEAST)).sum() / (none.sum() + LEAST)
    return near + far


def apart_loss(bases: Tensor) -> Tensor:
    """The mean over pairs of base crops (B, n, D) of the same volume of their squared similarity."""
    rows, columns = torch.triu_indices(bases.shape[1], bases.shape[1], offset=1)
    return similarity(bases, bases)[:, rows, columns].square().mean()


@dataclass
class VolumeContrast(PretrainedOnVolumes):
    """Tell where in its volume a crop comes from.

    crops    m, random crops of a volume
    follows  how much of itself the teacher's projection keeps each step
    context  False: a crop's shares are given to base crops at random, so that they say nothing about where it lies
    """

    crops: int = 2
    follows: float = 0.9
    context: bool = True

    def pretext_parts(self, model: nn.Module, inputs: int, dims: int) -> nn.Module:
        """The student's projection and the teacher's; the encoder is the network's, and one for both."""
        width = sum(self.channels)
        norm = nn.BatchNorm1d(width, affine=False, track_running_stats=False)
        student = nn.Sequential(norm, Projector(width, HIDDEN, OUTPUTS))
        return nn.ModuleDict({"student": student, "teacher": fresh(student)})

    def pretext(self, nets: nn.ModuleDict, images: Batch, now: Moment) -> Tensor:
        crops, y = self.puzzle(images.images)
        found = described(nets["model"], crops)
        vectors = lambda head: self.parted(head(found), len(y))  # noqa: E731
        student, bases = vectors(nets["pretext"]["student"])
        with torch.no_grad():
            teacher, steady = vectors(nets["pretext"]["teacher"])
            across = similarity(teacher, steady.roll(-1, dims=0))
        within = position_loss(similarity(student, steady), y)
        return within + position_loss(similarity(student, bases.roll(-1, dims=0)), across) + apart_loss(bases)

    def puzzle(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Base crops of volumes (B, C, *size), then random ones, (B (n + m), C, *small), and y (B, m, n)."""
        size = images.shape[2:]
        first = corners(size, self.crops * len(images)).view(len(images), self.crops, 3).to(images.device)
        y = overlaps(first.flatten(0, 1), size)
        if not self.context:
            y = torch.stack([shares[torch.randperm(len(shares)).to(shares.device)] for shares in y])
        random = torch.cat([crop(*each) for each in zip(images, first, strict=True)])
        crops = divisible(torch.cat([cut(images, sides(size)), random]), 2 ** (len(self.channels) - 1))
        rng = own_generator()
        return self.augmentation.intensity(crops, rng), y.view(len(images), self.crops, -1)

    def parted(self, vectors: Tensor, volumes: int) -> tuple[Tensor, Tensor]:
        """Vectors of random crops (B, m, D) and of base crops (B, n, D), from those of all crops of a puzzle."""
        random = self.crops * volumes
        return vectors[-random:].unflatten(0, (volumes, -1)), vectors[:-random].unflatten(0, (volumes, -1))

    def after_pretext(self, nets: nn.ModuleDict, now: Moment) -> None:
        follow(nets["pretext"]["teacher"], nets["pretext"]["student"], self.follows)


recipe = Recipe(
    paper="voco",
    title="Volume Contrast: where in the volume a crop comes from",
    claim="Before training on volumes of three labelled patients, predicting the position of crops of unlabelled ones "
    "raises Dice above that of as many steps on the labels from random weights.",
    arms={
        "from scratch": Arm(VOLUME_BASELINE),
        "scratch, all steps": Arm(VOLUME_LONGER),
        "voco": Arm(VolumeContrast()),
        "shuffled positions": Arm(VolumeContrast(context=False)),
    },
    compare=("voco", "from scratch"),
    ablation=("voco", "shuffled positions"),
    replicate="draw",
    scales=scales(BRAIN_VOLUMES, HIPPOCAMPI, "from scratch", "voco", "shuffled positions", budget=VOLUME_BUDGET),
    source="official code, github.com/Luffy03/Large-Scale-Medical (Self-supervised/models/voco_head.py) and "
    "github.com/Luffy03/VoCo; abstracts, arXiv 2410.09890 and 2402.17300",
    components=(
        Component(
            "base crops",
            "implemented",
            "3 x 3, over the whole first axis, as in the official code; it scales crops to cubes of 64, here their "
            "sides become multiples of 8: 32 x 16 x 16 voxels. Base crops of one volume are held apart, as there; the "
            "gradient goes to both of a pair, there to the first",
        ),
        Component(
            "contextual position prediction",
            "implemented",
            "two random crops a volume and the official loss. The projection has two layers behind a normalisation, "
            "there three, of a width of 1024 or 2048. Features are not dropped out at random",
        ),
        Component(
            "contrast with positive and negative pairs",
            "implemented",
            "base crops that a random crop overlaps are positive by that share, all others negative; and student and "
            "teacher have to agree about those of another volume",
        ),
        Component(
            "geometric context priors",
            "simplified",
            "regions of a volume that is already cropped around the hippocampus, in place of organs of the body. The "
            "ablation has the same crops, loss and teacher, and positions shuffled anew for every crop",
        ),
        Component(
            "PreCT-160K",
            "absent",
            "the training patients of one data set whose labels are hidden, and 120 steps. One run on validation "
            "patients, of a draw that is not scored, and of fewer steps: the loss of the pretext falls from 0.63 to "
            "0.40, with shuffled positions it stays at 1, and Dice ended at 0.55 and 0.49, from scratch at 0.56",
        ),
        Component("scaling laws", "absent", "one size of network and of data"),
        Component("benchmark of 48 tasks", "simplified", "one task; of other pretexts, chapter 13 has its own recipes"),
    ),
)
