"""SASNet, a scale-aware adaptive supervised network (Li et al., Pattern Recognition 2026, arXiv 2601.01005).

Idea: one encoder, two decoders; one starts from the deepest features, the other a level higher, and each is the other's
teacher. How sure each of them has been of the truth at every place of a labelled image is remembered from visit to
visit; the surer branch weighs more in the ensemble. Both also regress signed distances to the ensemble's boundaries.

    ensemble    argmax of sum_b p_b (1 + alpha c_b) on labelled images, of the mean on unlabelled ones
    memory      c_b <- (c_b + p_b[truth]) / 2, c_b = p_b[truth] on the first visit
    loss        1/2 sum_b L(p_b, truth) + w(t) sum_b [MSE(p_b, sharp(p_other)) + MSE(d_b, SDF(ensemble))]
"""

from copy import deepcopy
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from scipy.ndimage import distance_transform_edt
from torch import Tensor, nn

from medcook.data import IGNORE
from medcook.data.transforms import warp
from medcook.errors import MedcookError
from medcook.losses import find_loss
from medcook.methods import Batch, MeanTeacher, Moment
from medcook.methods.semi_supervised import SemiSupervised, forgetful
from medcook.networks.unet import DoubleConv, UNet
from medcook.recipes.recipe import Arm, Component, Recipe
from medcook.recipes.semi_supervised._settings import scales


class TwoBranchUNet(UNet):
    """A `UNet`, the high-level branch, and a second decoder on its encoder that never sees the deepest level."""

    def __init__(self, *, inputs: int, classes: int, channels: tuple[int, ...], dims: int):
        super().__init__(inputs=inputs, classes=classes, channels=channels, dims=dims)
        conv = type(self.head)
        self.low = nn.ModuleList(
            DoubleConv(deep + skip, skip, dims) for skip, deep in zip(channels, channels[1:-1], strict=False)
        )
        self.low_head = conv(channels[0], classes, 1)
        self.distances = nn.ModuleList(conv(channels[0], classes - 1, 1) for _ in range(2))

    def branches(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (2, B, classes, *size), and distances of the structures (2, B, classes - 1, *size) in -1 to 1."""
        skips = [self.down[0](image)]
        for block in self.down[1:]:
            skips.append(block(self.pool(skips[-1], 2)))
        high, low = self.climb(skips, self.up), self.climb(skips[:-1], self.low)
        logits = torch.stack([self.head(high), self.low_head(low)]).float()
        distances = torch.stack([head(x) for head, x in zip(self.distances, (high, low), strict=True)])
        return logits, distances.float().tanh()

    def climb(self, skips: list[Tensor], blocks: nn.ModuleList) -> Tensor:
        """From the last of the encoder's feature maps to the size of the first."""
        *skips, x = skips
        for block, skip in zip(reversed(blocks), reversed(skips), strict=True):
            x = F.interpolate(x, size=skip.shape[2:], mode=self.mode, align_corners=False)
            x = block(torch.cat([skip, x], dim=1))
        return x


class Confidence(nn.Module):
    """What probability each branch has given the true class, for every labelled sample, in the sample's own frame.

    value  (slots, 2, cells) running averages on a coarse grid, 0.5 before the first visit; `seen` (slots, cells)
    """

    def __init__(self, slots: int, dims: int):
        super().__init__()
        self.coarse = (32, 32) if dims == 2 else (16, 16, 16)
        cells = int(np.prod(self.coarse))
        self.register_buffer("value", torch.full((slots, 2, cells), 0.5, dtype=torch.float16))
        self.register_buffer("seen", torch.zeros(slots, cells, dtype=torch.bool))

    def recall(self, index: Tensor, grid: Tensor) -> Tensor:
        """(B, 2, *size), seen through the augmentation's grid (B, *size, dims)."""
        if index.max() >= len(self.value):
            raise MedcookError(f"There are more than {len(self.value)} labelled samples.", "Raise `slots`.")
        value = self.value[index].float().unflatten(2, self.coarse)
        return F.grid_sample(value, grid, padding_mode="border", align_corners=False)

    def update(self, index: Tensor, grid: Tensor, truth: Tensor, known: Tensor) -> None:
        """Average in the probabilities (B, 2, *size) of the true class, each at the cell its voxel came from."""
        side, count = self.coarse[0], self.seen.shape[1]
        strides = side ** torch.arange(len(self.coarse), device=grid.device)  # a grid names the last axis first
        for slot, place, sure, labelled in zip(index.tolist(), grid, truth, known, strict=True):
            cell = ((place + 1) / 2 * side).floor().long()
            inside = ((cell >= 0) & (cell < side)).all(-1) & labelled
            cell = (cell * strides).sum(-1)[inside]
            visits = torch.bincount(cell, minlength=count)
            now = torch.stack([torch.bincount(cell, branch[inside], count) for branch in sure]) / visits.clamp_min(1)
            before = self.value[slot].to(now.dtype)
            now = torch.where(self.seen[slot], (before + now) / 2, now)
            self.value[slot] = torch.where(visits > 0, now, before).to(self.value.dtype)
            self.seen[slot] |= visits > 0


def change_view(images: Tensor, labels: Tensor, grid: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """By chance, two axes of an image change places in the Fourier domain, one of them the last; labels, grid follow.

    The Fourier transform of a transposed image is the transposed Fourier transform: the image itself is transposed.
    """
    images, labels, grid = images.clone(), labels.clone(), grid.clone()
    size, space = labels.shape[1:], tuple(range(1, images.ndim - 1))
    axes = [axis for axis in range(len(size) - 1) if size[axis] == size[-1]]
    for k, choice in enumerate(torch.randint(len(axes) + 1, (len(images),), generator=rng).tolist()):
        if choice < len(axes):
            axis = axes[choice]
            spectrum = torch.fft.fftn(images[k], dim=space).transpose(axis + 1, -1)
            images[k] = torch.fft.ifftn(spectrum, dim=space).real
            labels[k] = labels[k].transpose(axis, -1).clone()
            grid[k] = grid[k].transpose(axis, -2).clone()
    return images, labels, grid


def signed_distance(inside: np.ndarray) -> np.ndarray:
    """Distance to the boundary of a mask (*size): 0 on it, up to 1 outside, down to -1 inside; 0 if there is none."""
    if inside.all() or not inside.any():
        return np.zeros(inside.shape, np.float32)
    outwards, inwards = distance_transform_edt(~inside), distance_transform_edt(inside)
    distance = outwards / outwards.max() - inwards / inwards.max()
    distance[inwards == 1] = 0
    return distance.astype(np.float32)


def signed_distances(masks: Tensor, classes: int) -> Tensor:
    """Those of every structure: (B, *size) class numbers to (B, classes - 1, *size)."""
    labels = masks.cpu().numpy()
    maps = [[signed_distance(label == value) for value in range(1, classes)] for label in labels]
    return torch.from_numpy(np.array(maps)).to(masks.device)


@dataclass
class SASNet(SemiSupervised):
    """Two branches that learn the labels, each other's sharpened output, and the distance map of their ensemble.

    strength     alpha: how much the remembered confidence adds to a branch's weight
    temperature  of the sharpened probabilities that one branch takes from the other
    distances    whether signed distances are regressed
    views        whether axes change places
    slots        the most labelled samples that the memory holds
    """

    strength: float = 0.5
    temperature: float = 0.1
    distances: bool = True
    views: bool = True
    slots: int = 512

    def build(self, inputs: int, classes: int, dims: int) -> nn.ModuleDict:
        """`model` and `average` are two-branch U-Nets, whose high-level branch predicts; `memory` is not trained."""
        model = TwoBranchUNet(inputs=inputs, classes=classes, channels=self.channels, dims=dims)
        average = deepcopy(model).requires_grad_(False)
        return nn.ModuleDict({"model": model, "average": average, "memory": Confidence(self.slots, dims)})

    def augment(self, batch: Batch, rng: torch.Generator) -> Batch:
        """As always, then another view; the batch says where each of its voxels came from."""
        grid = self.augmentation.grid(batch.images, rng)
        images, labels = warp(batch.images, batch.labels, grid)
        images = self.augmentation.intensity(images, rng)
        if self.views:
            images, labels, grid = change_view(images, labels, grid, rng)
        return batch._replace(images=images, labels=labels, grid=grid)

    def training_step(self, nets: nn.ModuleDict, labelled: Batch, unlabelled: Batch | None, now: Moment) -> Tensor:
        """Labels alone at first, while confidence is gathered; then the loss of the module's docstring."""
        logits, distances = nets["model"].branches(labelled.images)
        supervised = sum(find_loss(self.loss)(branch, labelled.labels) for branch in logits) / 2
        if unlabelled is None or now.fraction < self.start:
            self.ensemble(nets["memory"], logits.detach().softmax(2), labelled)
            return supervised
        with forgetful(nets["model"]):
            unseen = nets["model"].branches(unlabelled.images)
        logits, distances = torch.cat([logits, unseen[0]], dim=1), torch.cat([distances, unseen[1]], dim=1)
        probabilities, sharp = logits.softmax(2), (logits.detach() / self.temperature).softmax(2)
        consistency = 2 * (probabilities - sharp.flip(0)).square().mean()
        if self.distances:
            masks = self.ensemble(nets["memory"], probabilities.detach(), labelled)
            target = signed_distances(masks, logits.shape[2])
            consistency = consistency + 2 * (distances - target).square().mean()
        return supervised + self.rising(now) * consistency

    @torch.no_grad()
    def ensemble(self, memory: Confidence, probabilities: Tensor, labelled: Batch) -> Tensor:
        """Hard masks (B, *size) of both branches (2, B, classes, *size), of which the labelled ones are reweighted."""
        weights = torch.ones_like(probabilities[:, :, 0])
        if self.strength and labelled.index is not None and labelled.grid is not None:
            count, known = len(labelled.images), labelled.labels != IGNORE
            weights[:, :count] += self.strength * memory.recall(labelled.index, labelled.grid).transpose(0, 1)
            classes = torch.where(known, labelled.labels, 0).long().expand(2, *known.shape)
            truth = probabilities[:, :count].gather(2, classes[:, :, None])[:, :, 0]
            memory.update(labelled.index, labelled.grid, truth.transpose(0, 1), known)
        return (probabilities * weights[:, :, None]).sum(0).argmax(1)


recipe = Recipe(
    paper="sasnet",
    title="Scale-aware adaptive supervised network",
    claim="Branches weighted by their past confidence, which agree on distances, raise Dice above mean teacher.",
    arms={
        "mean teacher": Arm(MeanTeacher()),
        "sasnet": Arm(SASNet()),
        "without reweighting": Arm(SASNet(strength=0.0)),
        "without distances": Arm(SASNet(distances=False)),
    },
    compare=("sasnet", "mean teacher"),
    ablation=("sasnet", "without reweighting"),
    replicate="draw",
    scales=scales("mean teacher", "sasnet", "without reweighting"),
    components=(
        Component(
            "dual-branch architecture",
            "implemented",
            "a second decoder from one level above the deepest, as in the official code. The average of the high-level "
            "branch predicts, where the official code takes the mean of both, so that two branches are not counted as "
            "an ensemble. Each branch follows the other's sharpened output, which is held constant here",
        ),
        Component(
            "scale-aware adaptive reweight",
            "implemented",
            "confidence is kept in 32 x 32 cells of the unaugmented slice. As in the official code it needs the truth, "
            "so it weighs the branches on labelled images alone, and acts through the masks whose distances are "
            "regressed and nowhere else",
        ),
        Component(
            "view variance enhancement",
            "implemented",
            "the two axes of a slice change places with probability 1/2, by way of the Fourier domain as in the "
            "official code; it comes to the same as transposing the image",
        ),
        Component(
            "segmentation-regression consistency",
            "implemented",
            "distance maps of the ensemble's hard masks, structure by structure, on labelled and unlabelled images",
        ),
    ),
    published={
        "LA, 8 labelled": 0.8962,
        "LA, 16 labelled": 0.9182,
        "Pancreas-CT, 6 labelled": 0.7638,
        "Pancreas-CT, 12 labelled": 0.8160,
        "BraTS, 25 labelled": 0.8284,
        "BraTS, 50 labelled": 0.8584,
    },
    source="README of github.com/HUANGLIZI/SASNet, Dice",
)
