"""MIS-FM, Volume Fusion (Wang, Wu, Luo, Liu, Li and Zhang, arXiv 2306.16925, 2023).

Idea: a network for segmentation should be pre-trained by segmentation, its decoder included. So boxes of one unlabelled
volume F (foreground) are blended into another, B (background), each box with one of K strengths, and the network says
for every voxel how much of it is foreground. What is predicted is a class, with the loss of any segmentation:

    k     strength of a voxel: 0 outside of all boxes, else that of the box on top; boxes are drawn one after the other
    x     = k / K F + (1 - k / K) B,   k in {0, 1, ..., K},  K = 4
    loss  = CE(p, k) + Dice(p, k),   p the probabilities of K + 1 classes in x

With K = 1 a box is cut out and pasted: there is an edge to find, and no strength to tell. The other pretext that the
paper compares with, here as masked restoration in the manner of Models Genesis (Zhou et al., MICCAI 2019), hides parts
of a volume and changes its brightness, and asks for the volume as it was.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medcook.data.transforms import warp
from medcook.losses import find_loss
from medcook.methods import Batch, Moment, own_generator
from medcook.recipes.pretraining._settings import BRAIN_VOLUMES, HIPPOCAMPI, VOLUME_BUDGET, scales
from medcook.recipes.pretraining._volumes import VOLUME_BASELINE, VOLUME_LONGER, PretrainedOnVolumes
from medcook.recipes.recipe import Arm, Component, Recipe

BOXES = (10, 40)
"""Least and most boxes of a volume, as in the paper."""

SIDES = (1 / 8, 5 / 8)
"""Least and most of a volume's side that a box takes; the paper's, of a depth of 64."""

PAINTED, INSIDE = 0.9, 0.2
"""How often the restoration pretext hides anything, and how often it then hides boxes and not all but boxes."""
HIDDEN, SHOWN = (1 / 6, 1 / 3), (3 / 7, 4 / 7)
"""Sides of boxes that are hidden, or that stay; these and the rates as in the official code of Models Genesis."""


def between(low: int, high: int) -> int:
    """A random whole number, both ends included."""
    return int(torch.randint(low, high + 1, ()))


def box(size: tuple[int, ...], sides: tuple[float, float]) -> tuple[slice, ...]:
    """A random box in a volume of `size`: its centre lies anywhere, and what lies outside is cut off."""
    found = []
    for whole in size:
        side = between(max(1, round(sides[0] * whole)), max(1, round(sides[1] * whole)))
        first = between(0, whole - 1) - side // 2
        found.append(slice(max(first, 0), first + side))
    return tuple(found)


def strengths(size: tuple[int, ...], levels: int) -> Tensor:
    """k (*size) uint8 of one volume, 0 to `levels`: each box has one strength above 0 and covers those before it."""
    found = torch.zeros(size, dtype=torch.uint8)
    for _ in range(between(*BOXES)):
        found[box(size, SIDES)] = between(1, levels)
    return found


def fuse(foreground: Tensor, background: Tensor, k: Tensor, levels: int) -> Tensor:
    """x (B, C, *size) of two volumes (B, C, *size) and strengths k (B, *size), 0 to `levels`."""
    share = (k.float() / levels)[:, None]
    return share * foreground + (1 - share) * background


@dataclass
class VolumeFusion(PretrainedOnVolumes):
    """Predict how much of another volume was blended in, voxel by voxel; the network's last map is what predicts.

    levels  K, the number of strengths above 0; 1: boxes are cut out and pasted
    """

    levels: int = 4

    def pretext_parts(self, model: nn.Module, inputs: int, dims: int) -> nn.Module:
        """The last layer, the one part of the network that is not kept."""
        return (nn.Conv2d if dims == 2 else nn.Conv3d)(self.channels[0], self.levels + 1, 1)

    def pretext(self, nets: nn.ModuleDict, images: Batch, now: Moment) -> Tensor:
        """Each volume of a step is background once, and foreground once, of the next."""
        background = self.view(images.images)
        k = torch.stack([strengths(each.shape[1:], self.levels) for each in background]).to(background.device)
        fused = fuse(background.roll(1, dims=0), background, k, self.levels)
        return find_loss(self.loss)(nets["pretext"](nets["model"].features(fused)).float(), k)


def hidden(size: tuple[int, ...]) -> Tensor:
    """(*size) bool: what of one volume is hidden: nothing, up to five boxes, or all but up to five larger boxes."""
    chance, inside = torch.rand(2).tolist()
    if chance >= PAINTED:
        return torch.zeros(size, dtype=torch.bool)
    marked = torch.zeros(size, dtype=torch.bool)
    for _ in range(between(1, 5)):
        marked[box(size, HIDDEN if inside < INSIDE else SHOWN)] = True
    return marked if inside < INSIDE else ~marked


def paint(images: Tensor, where: Tensor) -> Tensor:
    """Volumes (B, C, *size) with noise of their own range of brightness where `where` (B, *size) is true."""
    low, high = (edge.view(-1, *[1] * (images.ndim - 1)) for edge in images.flatten(1).aminmax(dim=1))
    return torch.where(where[:, None], low + (high - low) * torch.rand_like(images), images)


@dataclass
class Restoration(PretrainedOnVolumes):
    """Give back a volume of which parts are hidden and the brightness is another."""

    def pretext_parts(self, model: nn.Module, inputs: int, dims: int) -> nn.Module:
        return (nn.Conv2d if dims == 2 else nn.Conv3d)(self.channels[0], inputs, 1)

    def pretext(self, nets: nn.ModuleDict, images: Batch, now: Moment) -> Tensor:
        """The mean squared error over all voxels."""
        rng = own_generator()
        whole = warp(images.images, None, self.augmentation.grid(images.images, rng))[0]
        where = torch.stack([hidden(each.shape[1:]) for each in whole]).to(whole.device)
        spoilt = paint(self.augmentation.intensity(whole, rng), where)
        return F.mse_loss(nets["pretext"](nets["model"].features(spoilt)).float(), whole)


recipe = Recipe(
    paper="mis-fm",
    title="Volume Fusion: pre-training a segmentation network by segmentation",
    claim="Before training on volumes of three labelled patients, Volume Fusion on unlabelled ones raises Dice above "
    "that of as many steps on the labels from random weights.",
    arms={
        "from scratch": Arm(VOLUME_BASELINE),
        "scratch, all steps": Arm(VOLUME_LONGER),
        "volume fusion": Arm(VolumeFusion()),
        "restoration": Arm(Restoration()),
        "cut and paste": Arm(VolumeFusion(levels=1)),
    },
    compare=("volume fusion", "from scratch"),
    ablation=("volume fusion", "cut and paste"),
    replicate="draw",
    scales=scales(BRAIN_VOLUMES, HIPPOCAMPI, "from scratch", "volume fusion", "cut and paste", budget=VOLUME_BUDGET),
    source="official code, github.com/openmedlab/MIS-FM and github.com/HiLab-git/PyMIC (net_run/self_sup/util.py, "
    "transform/crop4vf.py); numbers and sizes of boxes as MIC-DKFZ/nnssl notes them of the paper; abstract, "
    "arXiv 2306.16925",
    components=(
        Component(
            "volume fusion",
            "implemented",
            "foreground is the next volume of the step, as in the official code. There sub-volumes are cropped from "
            "scans of the body, so that the two differ in anatomy; here both are whole hippocampi, which differ by "
            "patient and by view",
        ),
        Component("discrete fusion coefficients", "implemented", "K = 4; the ablation has K = 1"),
        Component(
            "random patches",
            "implemented",
            "10 to 40 boxes, an eighth to five eighths of each side; there a sixteenth at least within a slice of 128, "
            "which would be two or three voxels here",
        ),
        Component(
            "self-supervised segmentation",
            "implemented",
            "the book's sum of cross-entropy and Dice, whose Dice leaves strength 0 out. All of the network but its "
            "last layer is kept. Dice and cross-entropy do not know that strengths have an order, nor does the paper",
        ),
        Component(
            "other self-supervised training",
            "simplified",
            "one of those compared there: restoration as in Models Genesis, an arm that `full` does not run, hiding "
            "parts of a volume at the official rates and sizes; the augmentation's change of brightness stands for "
            "its curve, and pixels are not shuffled",
        ),
        Component(
            "parallel convolution and transformer blocks",
            "absent",
            "PCT-Net is a network, not part of the comparison: all arms have the book's 3D U-Net",
        ),
        Component(
            "110k unannotated CT volumes",
            "absent",
            "the training patients of one data set whose labels are hidden, and 120 steps; there up to 400,000. This "
            "is the second evaluation. The first, with 120 steps on labels and an optimiser that kept the moments of "
            "the pretext's gradients, found 0.79 from scratch, 0.59 with fusion and 0.62 with two levels. What the "
            "chapter's recipes share was mended after it: each phase has its own optimiser, and volumes have 240 "
            "steps on labels. A structure is still not found in some runs after fusion, in the labelled volumes "
            "either, though the loss falls; normalisation, the average of the weights and their growth were looked at "
            "and are not the cause, which was not found",
        ),
        Component(
            "head and neck, thoracic and abdominal organs",
            "simplified",
            "two parts of the hippocampus in MR, with labels of three patients",
        ),
    ),
)
