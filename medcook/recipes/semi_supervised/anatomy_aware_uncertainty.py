"""Anatomically-aware uncertainty (Adiga V, Dolz and Lombaert, Medical Image Analysis 2024).

A denoising autoencoder that has only seen anatomy (corrupted label maps in, clean ones out) can say of a prediction
what the nearest plausible anatomy is. Where the two disagree the prediction is uncertain, and there the student
follows its teacher less: U = |plausible - predicted|^2, weight exp(-gamma U), voxel by voxel. That costs one pass
through a small network, where Monte Carlo dropout needs many through a large one.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medcook.data import IGNORE
from medcook.losses import soft_dice
from medcook.methods import Batch, MeanTeacher, Moment, UncertaintyAwareMeanTeacher
from medcook.methods.mean_teacher import squared_difference
from medcook.methods.semi_supervised import boxes, noisy
from medcook.recipes.recipe import Arm, Component, Recipe
from medcook.recipes.semi_supervised._settings import SCALES


class MaskAutoencoder(nn.Module):
    """Masks (B, classes, *size) to logits of the same shape, through one vector of `code` numbers.

    Works on a grid of 64 x 64 (32 x 32 x 32) points whatever the size; no skip connections, so that nothing but the
    code tells the decoder about the mask.
    """

    def __init__(self, classes: int, dims: int, code: int = 64, channels: tuple[int, ...] = (16, 32, 64, 64)):
        super().__init__()
        conv, norm = (nn.Conv2d, nn.BatchNorm2d) if dims == 2 else (nn.Conv3d, nn.BatchNorm3d)
        self.classes = classes
        self.grid = (64,) * dims if dims == 2 else (32,) * dims
        self.mode = "bilinear" if dims == 2 else "trilinear"
        down, up = [], []
        for inputs, outputs in zip((classes, *channels), channels, strict=False):
            down += [conv(inputs, outputs, 3, stride=2, padding=1), norm(outputs), nn.ReLU()]
        for inputs, outputs in zip(channels[::-1], (*channels[-2::-1], channels[0]), strict=True):
            up += [nn.Upsample(scale_factor=2, mode=self.mode), conv(inputs, outputs, 3, padding=1)]
            up += [norm(outputs), nn.ReLU()]
        deepest = (channels[-1], *(side // 2 ** len(channels) for side in self.grid))
        features = torch.Size(deepest).numel()
        self.encode = nn.Sequential(*down, nn.Flatten(), nn.Linear(features, code))
        self.decode = nn.Sequential(
            nn.Linear(code, features), nn.ReLU(), nn.Unflatten(1, deepest), *up, conv(channels[0], classes, 1)
        )

    def forward(self, masks: Tensor) -> Tensor:
        small = F.interpolate(masks, self.grid, mode="area")
        return F.interpolate(self.decode(self.encode(small)), masks.shape[2:], mode=self.mode, align_corners=False)


@dataclass
class AnatomyAware(MeanTeacher):
    """Mean teacher whose student follows less where the teacher's prediction is anatomically implausible.

    gamma     how fast the weight falls with the uncertainty (the official code: 1)
    code      numbers in which the autoencoder must say a label map
    views     corrupted versions of each label map that it learns from in a step
    weighted  False gives every voxel the same weight; the autoencoder stays
    """

    gamma: float = 1.0
    code: int = 64
    views: int = 2
    weighted: bool = True

    def build(self, inputs: int, classes: int, dims: int) -> nn.ModuleDict:
        """As always, and `anatomy`: the autoencoder of label maps."""
        nets = super().build(inputs, classes, dims)
        nets["anatomy"] = MaskAutoencoder(classes, dims, self.code)
        return nets

    def training_step(self, nets: nn.ModuleDict, labelled: Batch, unlabelled: Batch | None, now: Moment) -> Tensor:
        """Mean teacher's step; the autoencoder learns from the same labels, and shares no gradient with it."""
        anatomy = nets["anatomy"]
        small = F.interpolate(labelled.labels[:, None].float(), anatomy.grid, mode="nearest-exact")[:, 0]
        labels = torch.cat([small.to(torch.uint8)] * self.views)
        learnt = reconstruction_loss(anatomy.train()(corrupt(labels, anatomy.classes)).float(), labels)
        return super().training_step(nets, labelled, unlabelled, now) + learnt

    def unsupervised(self, nets: nn.ModuleDict, logits: Tensor, unlabelled: Batch, now: Moment) -> Tensor:
        """Mean squared difference of student and teacher, weighted by how plausible the teacher is."""
        taught = self.teach(nets, unlabelled.images)
        weight = self.certainty(nets, taught)
        difference = squared_difference(logits, taught).mean(1, keepdim=True)
        return (weight * difference).sum() / weight.sum()

    @torch.no_grad()
    def certainty(self, nets: nn.ModuleDict, probabilities: Tensor) -> Tensor:
        """exp(-gamma U), (B, 1, *size) in (0, 1], from one pass of the teacher's label map through the autoencoder."""
        classes = probabilities.shape[1]
        predicted = one_hot(probabilities.argmax(1), classes)
        plausible = nets["anatomy"].eval()(predicted).float().softmax(1)
        uncertainty = (plausible - probabilities).square().sum(1, keepdim=True)
        return torch.exp(-self.gamma * uncertainty * self.weighted)


def reconstruction_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Half squared error of the probabilities, half soft Dice, against the clean labels (B, *size)."""
    known = (labels != IGNORE)[:, None]
    squared = (squared_difference(logits, one_hot(labels, logits.shape[1])) * known).mean()
    return 0.5 * (squared + soft_dice(logits, labels))


def corrupt(labels: Tensor, classes: int, share: float = 0.3, reach: int = 3, side: float = 0.2) -> Tensor:
    """What a poor network might say of label maps (B, *size): (B, classes, *size), one-hot with noise.

    In half of the maps each voxel takes, with probability `share`, the label of another at most `reach` voxels away,
    which frays the borders; in half of them a box of `side` of every axis gets one random label, a hole or an island.
    """
    count, device = len(labels), labels.device
    chosen = torch.rand(2, count, *[1] * (labels.ndim - 1), device=device) < 0.5
    frayed = (torch.rand(labels.shape, device=device) < share) & chosen[0]
    labels = torch.where(frayed, neighbours(labels, reach), labels)
    box = boxes(count, tuple(labels.shape[1:]), side).to(device) & chosen[1]
    painted = torch.randint(classes, (count, *[1] * (labels.ndim - 1)), device=device)
    return noisy(one_hot(torch.where(box, painted.to(labels.dtype), labels), classes))


def neighbours(labels: Tensor, reach: int) -> Tensor:
    """For each voxel of (B, *size) the label of a random one at most `reach` voxels away along every axis."""
    size, index = labels.shape[1:], 0
    for axis, length in enumerate(size):
        here = torch.arange(length, device=labels.device).view([-1 if a == axis else 1 for a in range(len(size))])
        there = here + torch.randint(-reach, reach + 1, labels.shape, device=labels.device)
        index = index * length + there.clamp(0, length - 1)
    return labels.flatten(1).gather(1, index.flatten(1)).view_as(labels)


def one_hot(labels: Tensor, classes: int) -> Tensor:
    """(B, classes, *size) float32 of labels (B, *size); unlabelled voxels count as background."""
    known = torch.where(labels == IGNORE, 0, labels).long()
    return F.one_hot(known, classes).movedim(-1, 1).float()


recipe = Recipe(
    paper="anatomy-aware-uncertainty",
    title="Anatomically-aware uncertainty",
    claim="With three labelled patients, consistency weighted by the anatomical plausibility of each prediction beats "
    "mean teacher in Dice.",
    arms={
        "mean teacher": Arm(MeanTeacher()),
        "uncertainty-aware": Arm(UncertaintyAwareMeanTeacher()),
        "anatomy-aware": Arm(AnatomyAware()),
        "without weighting": Arm(AnatomyAware(weighted=False)),
    },
    compare=("anatomy-aware", "mean teacher"),
    ablation=("anatomy-aware", "without weighting"),
    replicate="draw",
    scales=SCALES,
    components=(
        Component(
            "anatomical representation",
            "implemented",
            "denoising autoencoder of label maps with a code of 64 numbers and no skip connections. It learns in the "
            "same steps as the network, so mostly before there is anything to weight; the paper trains it beforehand, "
            "for longer. Corruption: frayed borders, boxes and noise, without the official code's morphology",
        ),
        Component(
            "plausible segmentation",
            "implemented",
            "the autoencoder maps the teacher's label map, as in the official code; softmax in place of its sigmoids",
        ),
        Component(
            "uncertainty-guided consistency",
            "implemented",
            "exp(-gamma U) with the official gamma of 1; U is summed over the classes, the official code keeps them "
            "apart; weights are normalised, so without weighting this is mean teacher's loss",
        ),
        Component(
            "single inference", "implemented", "one pass of teacher and of autoencoder; measured against four votes"
        ),
        Component(
            "global information",
            "implemented",
            "every voxel of the plausible segmentation depends on the whole label map",
        ),
        Component("two data sets", "absent", "left atria and abdominal organs are not at hand; cardiac cine MR here"),
    ),
)
