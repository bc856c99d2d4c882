"""Uncertainty-aware multi-view co-training (Xia et al., WACV 2020; extended in Medical Image Analysis 2020).

A volume can be read along each of its axes. Each reading is a view with a network of its own, whose encoder is flat
(n x n x 1 kernels), so that the views do not learn the same features. On unlabelled volumes every view learns from
the others: their predictions p_j are fused, weighted by how sure each view is of each voxel,

    target of view i = sum over j != i of c_j p_j / sum over j != i of c_j,      c_j = 1 / U_j,

where U_j is the variance of p_j over stochastic passes with dropout, the epistemic uncertainty of Bayesian deep
learning. The loss is the sum over the views of L(p_i, label), plus, on unlabelled volumes, of L(p_i, target of i).
"""

from copy import deepcopy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medcook.losses import find_loss
from medcook.methods import Batch, Method, Moment
from medcook.methods.semi_supervised import forgetful
from medcook.networks import build_network
from medcook.recipes.baseline.unet_hippocampus import MILD
from medcook.recipes.recipe import Arm, Component, Recipe, Scale
from medcook.recipes.semi_supervised._settings import QUICK
from medcook.tasks import Budget, Task


def turn(volume: Tensor, view: int) -> Tensor:
    """(B, C, *size) as a view sees it: axes moved on by `view` places, and half a turn once all orders are used up."""
    dims = volume.ndim - 2
    turned = volume.permute(0, 1, *(2 + (axis + view) % dims for axis in range(dims)))
    return turned.flip(2, 3) if view // dims % 2 else turned


def turn_back(turned: Tensor, view: int) -> Tensor:
    """The inverse of `turn`."""
    dims = turned.ndim - 2
    volume = turned.flip(2, 3) if view // dims % 2 else turned
    return volume.permute(0, 1, *(2 + (axis - view) % dims for axis in range(dims)))


def flatten(encoder: nn.Module) -> None:
    """Replace every 3 x 3 x 3 kernel by 3 x 3 x 1 (3 x 3 by 3 x 1): the last axis is seen by the decoder alone."""
    for block in encoder:
        for place, conv in enumerate(block):
            if isinstance(conv, nn.Conv2d | nn.Conv3d):
                kernel = (*conv.kernel_size[:-1], 1)
                padding = tuple(side // 2 for side in kernel)
                block[place] = type(conv)(conv.in_channels, conv.out_channels, kernel, padding=padding, bias=False)


@torch.no_grad()
def sample(head: nn.Module, features: Tensor, rate: float, passes: int) -> tuple[Tensor, Tensor]:
    """Mean (B, classes, *size) and variance (B, 1, *size), summed over the classes, of stochastic predictions.

    Dropout stands right before the head, so only the head is run again: the same as `passes` runs of the network.
    """
    votes = torch.stack([head(F.dropout(features, rate)).float().softmax(1) for _ in range(passes)])
    return votes.mean(0), votes.var(0, correction=0).sum(1, keepdim=True)


def fuse(predictions: Tensor, confidence: Tensor) -> Tensor:
    """Each view's target: the others' predictions (views, B, classes, *size), averaged with weights `confidence`."""
    weighted = confidence * predictions
    return (weighted.sum(0) - weighted) / (confidence.sum(0) - confidence)


@dataclass
class MultiView(Method):
    """Supervised training of one U-Net per view; the mean of their probabilities predicts.

    views    how many: the orders of the axes first (3 in 3D, 2 in 2D), then the same after half a turn
    dropout  share of the last features that is dropped, before the head
    """

    views: int = 3
    dropout: float = 0.2

    def build(self, inputs: int, classes: int, dims: int) -> nn.ModuleDict:
        """`model` and `average` are lists of networks, one for each view."""
        sizes = dict(inputs=inputs, classes=classes, channels=self.channels, dims=dims)
        model = nn.ModuleList(build_network(self.network, **sizes) for _ in range(self.views))
        for net in model:
            flatten(net.down)
        return nn.ModuleDict({"model": model, "average": deepcopy(model).requires_grad_(False)})

    def training_step(self, nets: nn.ModuleDict, labelled: Batch, unlabelled: Batch | None, now: Moment) -> Tensor:
        """The sum of the views' losses on labelled volumes."""
        loss = find_loss(self.loss)
        seen = self.features(nets["model"], labelled.images)
        return sum(loss(logits, labelled.labels) for logits in self.logits(nets["model"], seen))

    def features(self, model: nn.ModuleList, images: Tensor) -> list[Tensor]:
        """The last features of every view, each in its own frame."""
        return [net.features(turn(images, view)) for view, net in enumerate(model)]

    def logits(self, model: nn.ModuleList, seen: list[Tensor]) -> list[Tensor]:
        """Logits (B, classes, *size) of every view, with dropout, in the common frame."""
        heads = [net.head(F.dropout(one, self.dropout)).float() for net, one in zip(model, seen, strict=True)]
        return [turn_back(one, view) for view, one in enumerate(heads)]

    def predict(self, nets: nn.ModuleDict, images: Tensor) -> Tensor:
        """The mean of the probabilities of all views' moving averages."""
        several = [net(turn(images, view)).float().softmax(1) for view, net in enumerate(nets["average"])]
        return torch.stack([turn_back(one, view) for view, one in enumerate(several)]).mean(0)


@dataclass
class UMCT(MultiView):
    """Multi-view training in which the views also teach each other on unlabelled volumes.

    start     share of the training on labels alone; then the views are fine-tuned together
    weight    of the loss on unlabelled volumes
    passes    stochastic predictions of each view
    floor     added to the variance: below it, voxels count as equally sure
    weighted  False fuses the other views by their plain mean
    """

    start: float = 0.3
    weight: float = 1.0
    passes: int = 8
    floor: float = 1e-3
    weighted: bool = True

    uses_unlabelled = True

    def training_step(self, nets: nn.ModuleDict, labelled: Batch, unlabelled: Batch | None, now: Moment) -> Tensor:
        """Every view learns the labels and what the others, weighted by their confidence, say of the rest."""
        supervised = super().training_step(nets, labelled, None, now)
        if unlabelled is None or now.fraction < self.start:
            return supervised
        with forgetful(nets["model"]):
            seen = self.features(nets["model"], unlabelled.images)
            logits = self.logits(nets["model"], seen)
        targets = self.targets(nets["model"], seen)
        return supervised + self.weight * sum(soft_loss(*pair) for pair in zip(logits, targets, strict=True))

    def targets(self, model: nn.ModuleList, seen: list[Tensor]) -> Tensor:
        """Pseudo-labels (views, B, classes, *size) in the common frame, from the features of every view."""
        votes = [sample(net.head, one, self.dropout, self.passes) for net, one in zip(model, seen, strict=True)]
        mean, variance = (
            torch.stack([turn_back(part, view) for view, part in enumerate(parts)])
            for parts in zip(*votes, strict=True)
        )
        confidence = 1 / (variance + self.floor)
        return fuse(mean, confidence if self.weighted else torch.ones_like(confidence))


def soft_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy and soft Dice, as for labels, against probabilities (B, classes, *size)."""
    soft, truth = logits.softmax(1)[:, 1:], target[:, 1:]
    axes = (0, *range(2, logits.ndim))
    dice = (2 * (soft * truth).sum(axes) + 1) / ((soft + truth).sum(axes) + 1)
    return F.cross_entropy(logits, target) + 1 - dice.mean()


SMALL = dict(channels=(8, 16, 32, 64), augmentation=MILD)
"""Of every network in every arm: three of them must fit into minutes on one core."""

LABELLED = 4

recipe = Recipe(
    paper="umct",
    title="Uncertainty-aware multi-view co-training in 3D",
    claim="With 4 labelled volumes, networks for three views of a volume that teach each other on unlabelled volumes "
    "reach a higher Dice than the same networks trained on the labels alone.",
    arms={
        "multi-view supervised": Arm(MultiView(**SMALL)),
        "umct": Arm(UMCT(**SMALL)),
        "without uncertainty": Arm(UMCT(weighted=False, **SMALL)),
    },
    compare=("umct", "multi-view supervised"),
    ablation=("umct", "without uncertainty"),
    replicate="draw",
    scales={
        "quick": QUICK,
        "full": Scale(
            Task("hippocampus", labelled=LABELLED, evaluation="test"),
            Budget(steps=120, batch=2, checks=4),
            replicates=3,
        ),
    },
    components=(
        Component(
            "multi-view co-training",
            "implemented",
            "One network per view; on unlabelled volumes each learns from the fusion of the others. First on labels "
            "alone, from 30% of the steps on together, at full weight (the paper: after a training of its own). The "
            "mean of the views predicts, in the comparator too.",
        ),
        Component(
            "views by rotating and permuting",
            "implemented",
            "Each axis in turn is the last one; further views add half a turn. On slices: 2 orders and a half turn.",
        ),
        Component(
            "asymmetric kernels",
            "implemented",
            "n x n x 1 in the encoder of a U-Net; the paper's is a ResNet-18 with weights learnt on photographs, ours "
            "starts at random.",
        ),
        Component(
            "Bayesian uncertainty",
            "implemented",
            "Variance of 8 predictions with dropout, which stands before the head in training too. Where the paper "
            "puts its dropout could not be looked up; here, only the head has to be run again.",
        ),
        Component(
            "uncertainty-weighted label fusion",
            "implemented",
            "Weight 1 / variance, voxel by voxel, with a floor of 1e-3 under the variance (our reading). Targets stay "
            "soft; the loss is the book's, where the paper uses Dice alone.",
        ),
        Component(
            "fully supervised use",
            "simplified",
            "The multi-view supervised arm, with few labels; the challenge entries on all labels are not repeated.",
        ),
    ),
)
