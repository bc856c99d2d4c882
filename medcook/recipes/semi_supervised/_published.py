"""The setting in which the semi-supervised literature publishes its figures on acdc (after Luo et al.'s SSL4MIS).

Whole slices of 256 x 256, a U-Net of 16 to 256 channels, stochastic gradient descent, 12 labelled and 12 unlabelled
images a step, 7 labelled patients (10% of them; its other setting is 3).

What stays the book's own: its U-Net has ReLUs and no dropout, slices keep their proportions, cross-entropy and Dice are
added and not averaged, gradients are clipped, further draws of labelled patients are replicates, the moving average
predicts, and the checkpoint that validation selects is a second column beside the last one.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import ConstantLR, LRScheduler

from medcook.data.transforms import Augment
from medcook.methods import MeanTeacher
from medcook.preparation import Preparation
from medcook.tasks import Task

REFLECTIONS = torch.tensor([[[-1, 0], [0, 1]], [[1, 0], [0, -1]], [[0, 1], [1, 0]], [[0, -1], [-1, 0]]]).float()
"""In a column, a row and the two diagonals: what quarter turns followed by a mirror amount to."""


@dataclass(frozen=True)
class WholeSlices(Task):
    """Whole slices on a grid of 256 x 256, the longer side filling it."""

    @cached_property
    def preparation(self) -> Preparation:
        return Preparation(size=(256, 256), long_side=256)


@dataclass(frozen=True)
class ReflectOrTilt(Augment):
    """Half of the slices reflected, a quarter turned by up to `rotate` degrees, the rest as they are."""

    rotate: float = 20.0
    scale: float = 0.0
    shift: float = 0.0
    gamma: float = 0.0
    contrast: float = 0.0
    brightness: float = 0.0
    noise: float = 0.0

    def affine(self, batch: int, dims: int, rng: torch.Generator) -> Tensor:
        """(batch, 2, 3) random maps from output to input coordinates."""
        tilted = super().affine(batch, dims, rng)
        reflected = torch.zeros_like(tilted)
        reflected[:, :, :2] = REFLECTIONS[torch.randint(0, len(REFLECTIONS), (batch,), generator=rng)]
        still = torch.eye(2, 3).expand_as(tilted)
        chance = torch.rand(batch, 1, 1, generator=rng)
        return torch.where(chance < 0.5, reflected, torch.where(chance < 0.75, tilted, still))


class AsPublished:
    """Mixed into a method: stochastic gradient descent with momentum 0.9, its rate constant throughout."""

    def optimise(self, trained: list[nn.Parameter], steps: int) -> tuple[Optimizer, LRScheduler]:
        optimiser = SGD(trained, lr=self.rate, momentum=0.9, weight_decay=self.decay)
        return optimiser, ConstantLR(optimiser, factor=1.0)


class PublishedMeanTeacher(AsPublished, MeanTeacher):
    """Mean teacher in this setting."""


TASK = WholeSlices("acdc", labelled=7, evaluation="test")

SETTINGS = dict(channels=(16, 32, 64, 128, 256), rate=0.01, decay=1e-4, average=0.99, augmentation=ReflectOrTilt())
"""Fields of every method in this setting."""
