"""What semi-supervised methods share: a supervised part, an unsupervised part that ramps up, and perturbed views."""

import contextlib
import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from medcook.data.transforms import Augment
from medcook.methods.method import Batch, Method, Moment

NARROW = (8, 16, 32, 64, 64)
"""Channels of the network in this chapter: half as wide as the baseline's, so that a minute buys twice the steps."""


@dataclass
class SemiSupervised(Method):
    """Labels alone at first; then labelled loss + weight * ramp-up * loss on unlabelled images.

    weight  of the unsupervised part at its full height
    start   share of the training that uses labels alone, so that there is something to teach
    ramp    share of the training over which the unsupervised part then rises
    """

    channels: tuple[int, ...] = NARROW
    weight: float = 1.0
    start: float = 0.5
    ramp: float = 0.2

    uses_unlabelled = True

    def training_step(self, nets: nn.ModuleDict, labelled: Batch, unlabelled: Batch | None, now: Moment) -> Tensor:
        """Labelled and unlabelled images pass apart, and only the labelled ones are remembered by normalisation."""
        supervised = super().training_step(nets, labelled, None, now)
        if unlabelled is None or now.fraction < self.start:
            return supervised
        with forgetful(nets["model"]):
            logits = nets["model"](self.view(unlabelled.images)).float()
            return supervised + self.rising(now) * self.unsupervised(nets, logits, unlabelled, now)

    def rising(self, now: Moment) -> float:
        """The weight of the unsupervised part at this moment."""
        return self.weight * ramp_up(now.fraction - self.start, self.ramp)

    def view(self, images: Tensor) -> Tensor:
        """The perturbed unlabelled images that the student sees: with noise, unless a subclass says otherwise."""
        return noisy(images)

    def unsupervised(self, nets: nn.ModuleDict, logits: Tensor, unlabelled: Batch, now: Moment) -> Tensor:
        """The loss of the student's logits (B, classes, *size) on unlabelled images."""
        raise NotImplementedError


@contextlib.contextmanager
def forgetful(network: nn.Module):
    """Inside the block batch normalisation goes by the batch and leaves its running statistics alone.

    The predicting network normalises by those statistics, and what it will see are plain images: perturbed ones must
    not leave their mark there.
    """
    layers = [layer for layer in network.modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm)]
    momenta = [layer.momentum for layer in layers]
    for layer in layers:
        layer.momentum = 0.0
    try:
        yield
    finally:
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum


def ramp_up(time: float, length: float) -> float:
    """exp(-5 (1 - t)^2) with t = time / length: 0 before time 0, 1 from `length` on (Laine and Aila, ICLR 2017)."""
    if time < 0:
        return 0.0
    return math.exp(-5 * (1 - time / length) ** 2) if time < length else 1.0


def noisy(images: Tensor, level: float = 0.1) -> Tensor:
    """Gaussian noise of `level` standard deviations, cut off at two of them."""
    return images + (torch.randn_like(images) * level).clamp(-2 * level, 2 * level)


def boxes(count: int, size: tuple[int, ...], side: float) -> Tensor:
    """(count, *size) bool masks, each True inside one box of `side` (a share of every axis) at a random place."""
    inside = torch.ones(count, *size, dtype=torch.bool)
    for axis, length in enumerate(size):
        extent = max(1, round(side * length))
        start = torch.randint(0, length - extent + 1, (count, 1))
        position = torch.arange(length)
        along = (position >= start) & (position < start + extent)
        inside &= along.view(count, *(length if a == axis else 1 for a in range(len(size))))
    return inside


STRONG = replace(Augment(), gamma=0.7, contrast=0.7, brightness=0.6, noise=0.3)


def strong(images: Tensor, side: float = 0.3) -> Tensor:
    """A strongly perturbed view on the same grid: grey values changed about twice as hard as in training, one box
    of each image blanked."""
    rng = torch.Generator().manual_seed(int(torch.randint(2**31, (1,))))
    changed = STRONG.intensity(images, rng)
    hole = boxes(len(images), tuple(images.shape[2:]), side).to(images.device)
    return changed.masked_fill(hole[:, None], 0.0)
